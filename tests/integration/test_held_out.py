"""Rows held out are never trained on, and `evaluate` finds them in the folder of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from betterhalf.run_dir import read_jsonl

Ends = Callable[..., str]


def test_evaluate_uses_the_rows_that_training_did_not(ends: Ends, train: Ends, tmp_path: Path) -> None:
    run, scores = tmp_path / "run", tmp_path / "scores"
    train(0, "task.num_prompts=12", "task.held_out=4", "training.steps=2", "training.prompts_per_step=8")
    ends(0, "evaluate", str(run), "task.part=held_out", "evaluate.samples=1", f"run_dir={scores}")
    trained = {row["prompt_id"] for row in read_jsonl(run / "rollouts.jsonl")}
    evaluated = {row["prompt_id"] for row in read_jsonl(scores / "evaluation.jsonl")}
    assert len(evaluated) == 4 and trained and evaluated.isdisjoint(trained)
