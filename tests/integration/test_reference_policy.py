"""KL penalty and entropy bonus in whole runs of the demo model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs.train import run_training

Configured = Callable[..., RunConfig]
Ends = Callable[..., str]

MEASURED_ONLY = 1e-12
"""Coefficient of a penalty that is measured and has no effect."""


@pytest.fixture
def rows_of(small_config: Configured, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a few steps, and return the rows of metrics; keyword arguments change the configuration."""
    count = 0

    def run(**changes: Any) -> list[dict[str, Any]]:
        nonlocal count
        count += 1
        folder = RunDir.create(tmp_path / f"run-{count}", resume=False)
        run_training(small_config(**changes), folder, resume=False, label="x")
        return read_jsonl(folder.metrics)

    return run


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_divergence_is_exactly_zero_before_the_first_update_and_positive_after(
    precision: str, rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    first, second = rows_of(precision={"preset": precision}, algorithm={"kl": {"coefficient": 0.01}})
    assert first["policy/reference_kl/mean"] == first["policy/reference_kl/max"] == 0.0
    assert 0 < second["policy/reference_kl/mean"] < second["policy/reference_kl/max"]


def test_a_refreshed_reference_is_the_policy_after_that_step(rows_of: Callable[..., list[dict[str, Any]]]) -> None:
    rows = rows_of(algorithm={"kl": {"coefficient": 0.01, "refresh_every": 2}}, training={"steps": 4})
    assert [row["policy/reference_kl/mean"] == 0.0 for row in rows] == [True, False, True, False]


def test_a_penalty_keeps_the_policy_closer(rows_of: Callable[..., list[dict[str, Any]]]) -> None:
    def run(coefficient: float) -> float:
        rows = rows_of(
            algorithm={"kl": {"coefficient": coefficient}},
            training={"steps": 5},
            optimizer={"learning_rate": 1e-3},
        )
        return sum(row["policy/reference_kl/mean"] for row in rows[3:])

    free, held = run(MEASURED_ONLY), run(10.0)
    assert 0 < held < 0.5 * free


def test_a_penalty_of_almost_nothing_and_none_train_alike(rows_of: Callable[..., list[dict[str, Any]]]) -> None:
    """Train on groups without advantage too, score the reference, and get the same loss to rounding."""
    plain = rows_of(precision={"preset": "fp32"})
    measured = rows_of(precision={"preset": "fp32"}, algorithm={"kl": {"coefficient": MEASURED_ONLY}})
    assert plain[0]["policy/kl_loss"] == 0.0 and "policy/reference_kl/mean" not in plain[0]
    for found, expected in zip(measured, plain, strict=True):
        for name in ("policy/loss", "optim/grad_norm", "rollout/reward/mean"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-8)


def test_a_penalty_in_the_reward_moves_the_advantages_but_not_the_reported_rewards(
    small_config: Configured, tmp_path: Path
) -> None:
    config = small_config(
        algorithm={"preset": "reinforce", "kl": {"coefficient": 0.5, "place": "reward"}},
        logging={"rollouts_per_step": 16},
    )
    run = RunDir.create(tmp_path / "run", resume=False)
    run_training(config, run, resume=False, label="x")
    for row, expect_zero in zip(read_jsonl(run.metrics), (True, False), strict=True):
        kept = [rollout for rollout in read_jsonl(run.rollouts) if rollout["step"] == row["step"]]
        penalties = [rollout["reward"] - rollout["advantage"] for rollout in kept]
        assert len(penalties) == 16
        assert all(penalty == 0.0 for penalty in penalties) is expect_zero
        assert row["rollout/kl_penalty/mean"] == pytest.approx(sum(penalties) / 16, abs=1e-6)
        assert row["rollout/reward/mean"] == pytest.approx(sum(rollout["reward"] for rollout in kept) / 16)
        assert row["policy/kl_loss"] == 0.0


def test_an_entropy_bonus_raises_the_entropy(rows_of: Callable[..., list[dict[str, Any]]]) -> None:
    plain = rows_of(training={"steps": 4})
    spread = rows_of(training={"steps": 4}, algorithm={"entropy_coefficient": 1.0})
    assert spread[0]["policy/entropy/mean"] == plain[0]["policy/entropy/mean"]
    assert spread[-1]["policy/entropy/mean"] > 1.1 * plain[-1]["policy/entropy/mean"]
    assert spread[0]["policy/entropy_bonus"] > 0 == plain[0]["policy/entropy_bonus"]


def test_penalties_work_where_trainer_and_engine_are_equal_bit_for_bit(
    rows_of: Callable[..., list[dict[str, Any]]],
) -> None:
    first, second = rows_of(
        engine={"rounding": "exact"},
        algorithm={"kl": {"coefficient": 0.01}, "entropy_coefficient": 0.01},
        training={"epochs": 2, "optimizer_steps": 1},
    )
    assert first["policy/reference_kl/max"] == 0.0 < second["policy/reference_kl/max"]
    # The second epoch has the same reference logprobs, in other packs, and a policy that has moved.
    assert first["policy/kl_loss"] > 0
    assert first["mismatch/k3/mean"] == second["mismatch/k3/mean"] == 0.0


def test_a_refresh_without_a_penalty_is_refused_before_anything_is_written(train: Ends, tmp_path: Path) -> None:
    message = train(2, "algorithm.kl.refresh_every=10")
    assert "algorithm.kl.refresh_every=10 refreshes a reference policy that nothing reads" in message
    assert "set algorithm.kl.coefficient above 0" in message
    assert not (tmp_path / "run").exists()
