"""The checks before a sweep: what `train` refuses without reading weights is refused by name before any cell runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from betterhalf.config.grid import load_grid
from betterhalf.errors import InputError
from betterhalf.runs.sweep_checks import check_cells, check_curves

ONE_GOOD_CELL_AND = """
device = "cpu"
logging.console = "quiet"
[task]
type = "arithmetic"
num_prompts = 8
[training]
steps = 2
prompts_per_step = 2
group_size = 2
[sweep.axes.case]
good = {}
"""
NO_DATA = 'evaluate.data.held_out = {type = "math", path = "missing.jsonl", template = "none"}'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{algorithm.routing_replay = true}", "algorithm.routing_replay=true is for a mixture of experts"),
        ('{training.keep_best_metric = "rollout/reward/men"}', "Did you mean 'rollout/reward/mean'?"),
        (f"{{evaluate.every = 1, {NO_DATA}}}", "missing.jsonl"),
        ('{watchdog.levels = [{metric = "mismatch/k3/men", above = 1}]}', "watchdog.levels[0].metric"),
    ],
)
def test_a_cell_that_train_refuses_is_named(tmp_path: Path, settings: str, message: str) -> None:
    file = tmp_path / "small.sweep.toml"
    file.write_text(f"{ONE_GOOD_CELL_AND}bad = {settings}\n", encoding="utf-8")
    with pytest.raises(InputError, match="^the cell case=bad cannot run: ") as refused:
        check_cells(load_grid(file).cells)
    assert message in str(refused.value)


def test_data_sets_are_read_only_if_a_run_evaluates_them(tmp_path: Path) -> None:
    file = tmp_path / "small.sweep.toml"
    file.write_text(f"{ONE_GOOD_CELL_AND}other = {{{NO_DATA}}}\n", encoding="utf-8")
    assert check_cells(load_grid(file).cells) > 0


def test_curves_of_every_metric_that_a_run_can_log_are_kept() -> None:
    check_curves(("mismatch/k3/mean", "task/solved/mean", "evaluation/held_out/accuracy/mean"))
    for name in ("mismatch/k3/men", "evaluation/held_out/accuracy"):
        with pytest.raises(InputError, match=f"sweep.curves names '{name}', which is no metric"):
            check_curves((name,))
