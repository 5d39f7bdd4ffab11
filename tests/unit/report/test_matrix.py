"""The tables of a probe fit the terminal, whatever its numbers are."""

from __future__ import annotations

import io
from typing import Any

import pytest

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.matrix import WIDTH, show_probe

NAMES = [name.removeprefix("mismatch/") for name in CATALOGUE if name.startswith("mismatch/")]


def pair(train: str, rollout: str, value: float) -> dict[str, Any]:
    metric = {"value": value, "low": value * 1.23, "high": value * 0.87}
    columns = ("k3", "mean_abs", "max_abs", "sequence_kl", "slope_per_1k")
    return {
        "train": train,
        "rollout": rollout,
        **dict.fromkeys(columns, value),
        "k3_ci": [value * 1.23, value * 0.87],
        "tokens": 12_345_678,
        "seconds": 12_345.6,
        "metrics": dict.fromkeys(NAMES, metric),
    }


@pytest.mark.parametrize("value", [-8.35e-12, -0.0907, -99.1234, -1.5e300])
@pytest.mark.parametrize("rollouts", [("fp16",), ("fp16", "bf16", "fp32"), ("fp16", "bf16", "fp32", "dump")])
def test_every_number_is_printed_whole_in_110_columns(
    value: float, rollouts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pairs = [pair(train, rollout, value) for train in ("fp16", "bf16", "fp32") for rollout in rollouts]
    stream = io.StringIO()
    show_probe({"pairs": pairs}, stream)
    shown = stream.getvalue()
    assert WIDTH == 110 and max(map(len, shown.splitlines())) <= WIDTH
    assert "\u2026" not in shown
    assert shown.count("]") == len(pairs) * len([name for name in NAMES if name != "tokens"]) + len(pairs)


@pytest.mark.parametrize("value", [-8.35e-12, -0.0907, -99.1234])
def test_pairs_of_one_rollout_stand_side_by_side(value: float) -> None:
    stream = io.StringIO()
    show_probe({"pairs": [pair(train, "fp16", value) for train in ("fp16", "bf16", "fp32")]}, stream)
    assert stream.getvalue().count("slope_per_1k") == 1
