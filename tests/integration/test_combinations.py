"""Parts of the loss, of sampling and of tasks in combinations: what each promises alone holds together."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError, InputError
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs.assembly import assemble, checked_algorithm
from betterhalf.runs.train import run_training

Configured = Callable[..., RunConfig]
Rows = list[dict[str, Any]]
ENVIRONMENT = {
    "type": "environment",
    "environment": f"{Path(__file__).parents[1] / 'turn_environments.py'}:Echo",
    "template": "none",
    "workers": 1,
}
EXACT = {"type": "native", "rounding": "exact"}
TRUNCATED = {"max_tokens": 40, "temperature": 1.5, "top_p": 0.95, "top_k": 6}
TERMS = {"kl": {"coefficient": 0.1}, "entropy_coefficient": 0.01}


@pytest.fixture
def run(small_config: Configured, tmp_path: Path) -> Callable[..., Rows]:
    """Train two steps, and return the rows of metrics; keyword arguments change the configuration."""

    def train(name: str = "run", *, resume: bool = False, turns: bool = False, **changes: Any) -> Rows:
        data = small_config(**changes).model_dump()
        config = RunConfig.model_validate({**data, "task": ENVIRONMENT} if turns else data)
        folder = RunDir.create(tmp_path / name, resume=resume)
        run_training(config, folder, resume=resume, label="x")
        rows = read_jsonl(folder.metrics)
        assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
        return rows

    return train


def without_times(rows: Rows) -> Rows:
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "system/"))} for row in rows]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_turns_in_a_truncated_distribution_have_no_mismatch_in_exact_rounding(
    precision: str, run: Callable[..., Rows]
) -> None:
    rows = run(
        turns=True,
        precision={"preset": precision},
        engine=EXACT,
        sampling=TRUNCATED,
        algorithm={**TERMS, "dynamic_sampling": True},
        training={"epochs": 2},
    )
    assert [row["mismatch/log_ratio/max_abs"] for row in rows] == [0.0, 0.0]
    assert all(row["rollout/turns/mean"] == 2 and row["rollout/support/mass/mean"] < 0.999 for row in rows)
    # The reference is scored over the same sets of tokens: before any update it is the policy.
    assert rows[0]["policy/reference_kl/max"] == 0.0 < rows[1]["policy/reference_kl/max"]
    assert all(row["policy/entropy_bonus"] > 0 and row["optim/grad_norm"] > 0 for row in rows)


def test_score_centering_acts_on_no_token_of_exact_turns(run: Callable[..., Rows]) -> None:
    choices = {"preset": "rloo", "score_centering": 8}
    rows = run(turns=True, engine=EXACT, algorithm=choices, training={"optimizer_steps": 1})
    assert [row["loss/score_centering/coefficients"] for row in rows] == [0.0, 0.0]
    assert all(row["rollout/turns/mean"] == 2 and row["optim/grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("place", ["loss", "reward"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_step_of_masked_completions_only_has_no_gradient(
    place: str, aggregation: str, run: Callable[..., Rows]
) -> None:
    choices = {**TERMS, "preset": "icepop", "kl": {"coefficient": 0.1, "place": place}, "mask_truncated": True}
    rows = run(
        sampling={"max_tokens": 3},
        algorithm={**choices, "aggregation": aggregation, "denominator": "kept"},
        training={"epochs": 2},
    )
    for row in rows:
        assert row["rollout/masked_fraction"] == 1.0
        assert row["policy/loss"] == row["optim/grad_norm"] == row["optim/skipped"] == 0.0
        assert row["rollout/kept/zero_advantage_fraction"] == 1.0


def test_the_reward_penalty_leaves_groups_without_signal_alone_under_dynamic_sampling(run: Callable[..., Rows]) -> None:
    """Three tokens solve nothing: all rewards are equal, and the penalty alone must not train."""
    penalty = {"coefficient": 1.0, "place": "reward"}
    choices = {"kl": penalty, "entropy_coefficient": 0.1}
    rows = run(sampling={"max_tokens": 3}, algorithm={**choices, "dynamic_sampling": True})
    assert rows[1]["policy/reference_kl/max"] > 0
    assert [row["rollout/kept/zero_advantage_fraction"] for row in rows] == [1.0, 1.0]
    plain = run("plain", sampling={"max_tokens": 3}, algorithm=choices)
    assert plain[1]["rollout/kept/zero_advantage_fraction"] < 1.0


def test_a_resumed_run_with_everything_at_once_continues_as_if_it_had_not_stopped(
    run: Callable[..., Rows], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "turns": True,
        "sampling": TRUNCATED,
        "algorithm": {**TERMS, "kl": {"coefficient": 0.1, "place": "reward", "refresh_every": 2}},
        "training": {"steps": 4, "epochs": 2, "checkpoint_every": 1, "keep_checkpoints": 4},
        "evaluate": {"every": 2, "samples": 2, "max_prompts": 2, "top_p": 0.8},
    }
    whole = run("whole", **changes)
    assert [row["policy/reference_kl/max"] == 0 for row in whole] == [True, False, True, False]
    for last in (1, 3):
        shutil.copytree(tmp_path / "whole", tmp_path / f"from-{last}")
        for step in range(last + 1, 5):
            shutil.rmtree(tmp_path / f"from-{last}" / "checkpoints" / f"step-{step:06d}")
        assert without_times(run(f"from-{last}", resume=True, **changes)) == without_times(whole)


def test_a_group_of_one_cannot_be_sampled_dynamically(small_config: Configured) -> None:
    config = small_config(
        algorithm={"preset": "reinforce", "dynamic_sampling": True}, training={"group_size": 1, "optimizer_steps": 1}
    )
    with pytest.raises(ConfigError, match="is every group"):
        checked_algorithm(config, evaluating=False)


def test_an_evaluation_longer_than_the_context_is_refused_by_its_own_key(small_config: Configured) -> None:
    config = small_config(evaluate={"every": 1, "max_tokens": 500})
    with pytest.raises(InputError, match=r"evaluate\.max_tokens=500 exceed(.|\n)*Set evaluate\.max_tokens=112 or less"):
        assemble(config)
