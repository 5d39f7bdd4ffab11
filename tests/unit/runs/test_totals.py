"""The numbers of a summary, from rows in which a step measured no finite value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.integrations.trl import record
from betterhalf.run_dir import RunDir, append_jsonl
from betterhalf.runs.train import summarise


def step(number: int, k3: float, gap: float) -> dict[str, Any]:
    values = {"rollout/reward/mean": 0.5, "rollout/truncated_fraction": 0.0, "optim/skipped": 0.0}
    gaps = {"mismatch/prob_gap/max": gap, "mismatch/prob_gap/min": -gap}
    return {"step": number, "policy/version": number, "mismatch/k3/mean": k3, **values, **gaps}


@pytest.mark.parametrize(
    ("steps", "k3", "gap"),
    [
        ([step(1, 2e-6, 0.1), step(2, float("inf"), float("nan")), step(3, 4e-6, 0.3)], pytest.approx(3e-6), 0.3),
        ([step(1, float("inf"), float("nan"))], None, None),
    ],
)
def test_a_summary_leaves_out_steps_whose_mismatch_is_not_finite(
    tmp_path: Path, steps: list[dict[str, Any]], k3: float | None, gap: float | None
) -> None:
    run = RunDir(tmp_path)
    for row in steps:
        append_jsonl(run.metrics, row)  # infinity and NaN are null in the file
    for found in (summarise(run, RunConfig()), record._totals(record.read_jsonl(run.metrics))):
        assert (found["mismatch_k3"], found["mismatch_max_abs"]) == (k3, gap)
        assert (found["last_reward"], found["skipped_steps"]) == (0.5, 0)
