"""Pinned metrics of a tiny FP32 run of the demo model: a change that should keep numbers leaves this test untouched.

python tests/golden/test_golden_run.py      rewrites demo_fp32.json (say why in the commit)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs.train import run_training

GOLDEN = Path(__file__).with_name("demo_fp32.json")
PINNED = (
    "rollout/reward/mean",
    "rollout/length/mean",
    "policy/loss",
    "policy/entropy/mean",
    "policy/clip_fraction",
    "optim/grad_norm",
)
PRESETS = ("grpo", "pg_seq_is", "gspo")


def golden_run(preset: str, folder: Path) -> list[dict[str, float]]:
    """Return the pinned metrics of three steps."""
    config = RunConfig.model_validate(
        {
            "precision": {"preset": "fp32"},
            "task": {"type": "arithmetic", "num_prompts": 64},
            "algorithm": {"preset": preset},
            "sampling": {"max_tokens": 40},
            "training": {"steps": 3, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2},
            "optimizer": {"learning_rate": 1e-4},
            "logging": {"console": "quiet"},
        }
    )
    run = RunDir.create(folder, resume=False)
    run_training(config, run, resume=False, label=preset)
    return [{name: row[name] for name in PINNED} for row in read_jsonl(run.metrics)]


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_and_rewards_are_those_of_the_golden_run(preset: str, tmp_path: Path) -> None:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text())
    rows = golden_run(preset, tmp_path / "run")
    for found, expected in zip(rows, golden[preset], strict=True):
        assert found["rollout/reward/mean"] == expected["rollout/reward/mean"]
        assert found["rollout/length/mean"] == expected["rollout/length/mean"]
        # other processors sum in another order, which gives FP32 noise that Adam's division amplifies
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-7)


def write_golden() -> None:
    """Run all presets and replace the file."""
    with tempfile.TemporaryDirectory() as folder:
        rows = {preset: golden_run(preset, Path(folder) / preset) for preset in PRESETS}
    GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write_golden())
