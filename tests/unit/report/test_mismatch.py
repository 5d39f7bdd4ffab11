"""Bins and completions of a run: token-weighted, over the last quarter of its steps, or from recorded rollouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from betterhalf.report.bins import pool
from betterhalf.report.data import Arm, load
from betterhalf.report.mismatch import bins, completions, mismatch_figures
from betterhalf.run_dir import RunDir, append_jsonl


def bin_row(tokens: int, k3: float, lower: float = 0.0, upper: float | None = 1.0) -> dict[str, Any]:
    return {"lower": lower, "upper": upper, "tokens": tokens, "k3": k3, "prob_gap_mean_abs": 2 * k3}


def arm_of(path: Path, **files: list[dict[str, Any]]) -> Arm:
    run = RunDir.create(path, resume=False)
    for name, rows in files.items():
        for row in rows:
            append_jsonl(run.path / f"{name}.jsonl", row)
    return load([run]).arms[0]


def test_bins_are_pooled_by_their_tokens() -> None:
    (one,) = pool([bin_row(1, 4e-6), bin_row(3, 8e-6), bin_row(0, 1.0)])
    assert (one.tokens, one.k3, one.gap) == (4, pytest.approx(7e-6), pytest.approx(14e-6))


def test_bins_are_in_order_and_may_be_open() -> None:
    found = pool([bin_row(1, 1e-6, 8.0, None), bin_row(1, 1e-6, 0.0, 8.0), {"lower": "x"}, {"tokens": 3}])
    assert [(one.lower, one.upper) for one in found] == [(0.0, 8.0), (8.0, math.inf)]


def test_the_last_quarter_of_the_steps_counts(tmp_path: Path) -> None:
    rows = [
        {"step": step, "completions": [[step, float(step)]], "by_position": [bin_row(1, step * 1e-6)]}
        for step in range(1, 9)
    ]
    arm = arm_of(tmp_path / "run", mismatch=rows, metrics=[{"step": 1}])
    assert completions(arm) == [(7.0, 7.0), (8.0, 8.0)]
    assert bins(arm, "by_position")[0].k3 == pytest.approx(7.5e-6)
    assert bins(arm, "by_probability") == []


def test_a_run_without_the_file_is_shown_by_its_rollouts(tmp_path: Path) -> None:
    half, ratio = math.log(0.5), 1e-4
    row = {"step": 4, "trainer_logprobs": [half + ratio, None, half], "behavior_logprobs": [half, -1.0, half]}
    arm = arm_of(tmp_path / "run", rollouts=[{"step": 1, "trainer_logprobs": [0.0]}, row])
    assert completions(arm) == [(2.0, pytest.approx(ratio))]
    (one,) = bins(arm, "by_probability")
    # exp(d) - 1 - d = d^2 / 2 + d^3 / 6 + ...; the mean over two tokens, one of them equal on both sides.
    assert (one.lower, one.upper, one.tokens) == (0.5, 0.9, 2)
    assert one.k3 == pytest.approx((ratio**2 / 2 + ratio**3 / 6) / 2, rel=1e-9)
    assert one.gap == pytest.approx(0.5 * math.expm1(ratio) / 2)


def test_figures_appear_for_what_was_recorded(tmp_path: Path) -> None:
    arm = arm_of(tmp_path / "run", mismatch=[{"step": 1, "completions": [[3, 0.1], [5, 0.3]], "by_position": "no"}])
    (slope,) = mismatch_figures([arm])
    assert slope.key == "slope"
    assert "+100 per 1k" in slope.legend
