"""The tables of a probe fit the terminal, whatever its numbers are."""

from __future__ import annotations

import io
from typing import Any

import pytest

from betterhalf.examine.probe_text import WIDTH, show_probe
from betterhalf.metrics.catalogue import CATALOGUE

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
def test_pairs_of_one_rollout_are_side_by_side(value: float) -> None:
    stream = io.StringIO()
    show_probe({"pairs": [pair(train, "fp16", value) for train in ("fp16", "bf16", "fp32")]}, stream)
    assert stream.getvalue().count("slope_per_1k") == 1


def test_the_reason_for_having_no_interval_is_below_the_table_once() -> None:
    none = {"value": 0.5, "low": None, "high": None, "reason": "64 completions are too few"}
    first, second = (pair(train, "fp16", 1e-4) for train in ("fp16", "bf16"))
    for row in (first, second):
        row["metrics"] = row["metrics"] | {"sequence_log_ratio/p1": none, "prob_gap/max": none | {"reason": "extreme"}}
    second["metrics"]["k3/mean"] = none | {"reason": "one prompt carries it"}
    second["k3_ci"] = [None, None]
    stream = io.StringIO()
    show_probe({"pairs": [first, second]}, stream)
    shown = stream.getvalue()
    assert shown.count("no interval: 64 completions are too few") == 1
    assert shown.count("no interval: one prompt carries it") == 2, "below k3 and below the other quantities"
    (row,) = (line for line in shown.splitlines() if "sequence_log_ratio/p1" in line)
    number = shown[: shown.index(" no interval: 64")].rsplit("\n", 1)[-1]
    assert row.count(f"0.5000 {number}") == 2
