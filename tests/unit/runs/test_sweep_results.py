"""Rows of a sweep's results from the steps of its runs, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from betterhalf.config.grid import Cell, Grid, load_grid
from betterhalf.run_dir import RunDir, append_jsonl, read_jsonl, write_json_atomic
from betterhalf.runs.sweep_results import (
    cell_row,
    combination_rows,
    curve_row,
    emulated_formats,
    head_row,
    line_of,
    write_rows,
)

SWEEP = """
[sweep]
seeds = [0, 1]
[sweep.axes]
precision = ["bf16", "fp16"]
"optimizer.learning_rate" = [1e-4, 2e-4]
"""


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    """Two precisions, two learning rates, two seeds."""
    (tmp_path / "small.sweep.toml").write_text(SWEEP, encoding="utf-8")
    return load_grid(tmp_path / "small.sweep.toml")


def trained(path: Path, rewards: list[float], k3: list[float], **summary: object) -> RunDir:
    run = RunDir.create(path, resume=False)
    for step, (reward, value) in enumerate(zip(rewards, k3, strict=True), start=1):
        row = {"step": step, "rollout/reward/mean": reward, "mismatch/k3/mean": value, "optim/skipped": step == 1}
        budget = {"rollout/length/mean": 30.0, "budget/sigma2": 1e-3, "budget/correlation": 2.0}
        append_jsonl(run.metrics, {**row, **budget, "optim/skipped": float(step == 1), "optim/grad_norm": None})
    write_json_atomic(run.summary, {"seconds": 12.3456789, **summary})
    return run


def test_a_run_s_row_has_its_numbers(grid: Grid, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", [0.5] * 20 + [0.9] * 20, [1e-4] * 5 + [3e-4] * 35, final_accuracy=0.75)
    row = cell_row(grid.cells[0], run, 20, None)
    assert row is not None
    assert (row["kind"], row["label"]) == ("cell", "precision=bf16,learning_rate=0.0001,seed=0")
    assert row["point"] == {"precision": "bf16", "learning_rate": "0.0001"} and row["outcome"] == "learned"
    assert (row["reward_first"], row["reward_final"], row["accuracy"]) == (0.5, 0.9, 0.75)
    assert (row["k3_first"], row["k3_max"], row["k3_final"]) == (1e-4, 3e-4, 3e-4)
    assert (row["exponent_first"], row["exponent_max"]) == (0.06, 0.06)  # 30 x 1e-3 x 2
    assert (row["skipped"], row["steps"], row["seconds"]) == (1, 40, 12.3457)
    assert row["window"] == 10  # a quarter of 40 steps
    assert "grad_norm_max" not in row and "reason" not in row


def test_a_run_that_ended_early_is_stopped_a_crash_failed_and_an_open_run_has_no_row(
    grid: Grid, tmp_path: Path
) -> None:
    run = trained(tmp_path / "run", [0.5] * 40, [1e-4] * 40, reason="the watchdog stopped it")
    stopped = cell_row(grid.cells[0], run, 20, None)
    assert stopped is not None and (stopped["outcome"], stopped["reason"]) == ("stopped", "the watchdog stopped it")
    nothing = RunDir(tmp_path / "nothing")
    assert cell_row(grid.cells[0], nothing, 20, None) is None
    failed = cell_row(grid.cells[0], nothing, 20, "SIGKILL")
    assert failed is not None and (failed["outcome"], failed["reason"]) == ("failed", "SIGKILL")


def row_of(cell: Cell, **values: object) -> dict[str, object]:
    return {"combination": cell.combination, "point": dict(cell.point), "emulated": [], **values}


def test_a_combination_has_the_means_of_its_seeds_without_those_that_failed(grid: Grid) -> None:
    first, second, other, crashed = grid.cells[:4]
    cells = [
        row_of(first, outcome="learned", reward_final=0.8, k3_first=1e-4),
        row_of(second, outcome="dips", reward_final=0.9, k3_first=1e-2),
        row_of(other, outcome="learned", reward_final=0.7),
        row_of(crashed, outcome="failed"),
    ]
    one, two = combination_rows(cells)
    assert (one["n"], one["outcomes"]) == (2, {"learned": 1, "dips": 1})
    assert one["reward_final"]["mean"] == 0.85 and one["k3_first"]["mean"] == pytest.approx(1e-3)
    assert one["reward_final"]["low"] == pytest.approx(0.85 - 12.706205 * 0.05, abs=1e-5)
    assert (two["n"], two["outcomes"]) == (1, {"learned": 1, "failed": 1})
    assert two["reward_final"]["mean"] == 0.7 and math.isnan(two["reward_final"]["low"])


def test_curves_have_four_digits_and_only_metrics_that_were_logged(grid: Grid, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", [1 / 3] * 2, [1.23456e-7, 2e-7])
    names = ("rollout/reward/mean", "mismatch/k3/mean", "optim/grad_norm")
    curve = curve_row(grid.cells[1], run, names)
    assert curve == {
        "label": "precision=bf16,learning_rate=0.0001,seed=1",
        "combination": "precision=bf16,learning_rate=0.0001",
        "seed": 1,
        "rollout/reward/mean": [0.3333, 0.3333],
        "mismatch/k3/mean": [1.235e-07, 2e-07],
    }
    write_rows(run, [{"low": math.nan}], [line_of(curve)])
    assert run.curves.read_text(encoding="utf-8").count(" ") == 0 and read_jsonl(run.results) == [{"low": None}]


def test_the_head_has_the_axes_with_positions_and_the_settings_that_all_runs_share(grid: Grid) -> None:
    head = head_row(grid)
    assert [axis["positions"] for axis in head["axes"]] == [[7.0, 10.0], [1e-4, 2e-4]]
    assert head["axes"][0]["quantity"] == "stored mantissa bits (precision)"
    assert head["settings"]["model.name"] == "demo"
    assert not {"optimizer.learning_rate", "precision.preset"} & head["settings"].keys()
    assert emulated_formats(grid.cells[0]) == []


def test_the_head_says_what_each_label_of_a_named_axis_changes(grid: Grid, tmp_path: Path) -> None:
    assert not any("changes" in axis for axis in head_row(grid)["axes"])
    text = "[sweep.axes.bits]\n'two/bits' = {precision = 'e8m2', training.steps = 3}\nplain = {}\n"
    (tmp_path / "named.sweep.toml").write_text(text, encoding="utf-8")
    (axis,) = head_row(load_grid(tmp_path / "named.sweep.toml"))["axes"]
    assert axis["changes"] == {"two-bits": {"precision.preset": "e8m2", "training.steps": 3}, "plain": {}}
