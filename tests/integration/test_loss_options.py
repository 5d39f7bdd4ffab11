"""Options of the loss in whole steps: Score Centering, masked completions, several epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError
from betterhalf.runs.assembly import assemble, checked_algorithm
from betterhalf.runs.loop import StepResult, train_steps
from betterhalf.runs.progress import Progress
from betterhalf.runs.weight_sync import sync_weights

Configured = Callable[..., RunConfig]
SCORE = {"level": "token", "ratio": "current/behavior", "gradient": "logprob", "treatment": "truncate", "upper": 2}


def trained(config: RunConfig) -> tuple[dict[str, Any], list[StepResult]]:
    """Return the digests of the weights after the run's steps, and the results of the steps."""
    parts, results = assemble(config), []
    try:
        sync_weights(parts)
        train_steps(parts, Progress(), results.append)
        return dict(parts.trainer.report().digests), results
    finally:
        parts.close()


def centering(results: list[StepResult]) -> list[float]:
    return [float(result.metrics.get("loss/score_centering/coefficients") or 0.0) for result in results]


def test_score_centering_changes_no_bit_where_engine_and_trainer_agree(small_config: Configured) -> None:
    exact = {"engine": {"type": "native", "rounding": "exact"}, "training": {"optimizer_steps": 1}}
    plain, _ = trained(small_config(**exact, algorithm={"preset": "rloo"}))
    centred, results = trained(small_config(**exact, algorithm={"preset": "rloo", "score_centering": 8}))
    assert centred == plain
    assert centering(results) == [0.0, 0.0]
    assert all(result.metrics["mismatch/log_ratio/max_abs"] == 0 for result in results)


@pytest.mark.parametrize("surrogate", [{}, {"surrogate": SCORE}])
def test_score_centering_acts_where_they_differ(small_config: Configured, surrogate: dict[str, Any]) -> None:
    changes = {"precision": {"preset": "e8m3"}}
    plain, _ = trained(small_config(**changes, algorithm={"preset": "rloo", **surrogate}))
    centred, results = trained(small_config(**changes, algorithm={"preset": "rloo", "score_centering": 8, **surrogate}))
    assert centred != plain
    assert max(centering(results)) > 1e-4
    assert all(0 <= (result.metrics.get("loss/score_centering/tail") or 0.0) < 1 for result in results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"type": "vllm"}}, "which engine.type=vllm does not report; set engine=native"),
        ({"sampling": {"top_p": 0.9}}, "top_p"),
    ],
)
def test_score_centering_needs_the_distribution_of_the_engine(
    small_config: Configured, changes: dict[str, Any], message: str
) -> None:
    config = small_config(algorithm={"preset": "rloo", "score_centering": 8}, **changes)
    with pytest.raises(ConfigError, match=message):
        checked_algorithm(config, evaluating=False)


def test_masked_completions_are_counted_and_have_no_loss(small_config: Configured) -> None:
    # Most completions of the demo model end well before 40 tokens, and some do not end within 16.
    changes = {"sampling": {"max_tokens": 16}}
    _, plain = trained(small_config(**changes))
    _, masked = trained(small_config(**changes, algorithm={"mask_truncated": True}))
    first, other = masked[0].metrics, plain[0].metrics
    assert first["rollout/masked_fraction"] == first["rollout/kept/truncated_fraction"]
    assert float(first["rollout/masked_fraction"] or 0) > 0
    assert other["rollout/masked_fraction"] == 0
    assert first["rollout/reward/mean"] == other["rollout/reward/mean"]
    assert first["mismatch/tokens"] == other["mismatch/tokens"]
    cut = [kept for kept in masked[0].kept if kept.rollout.completion.truncated]
    assert all(kept.advantage == 0 for kept in cut)


def test_epochs_repeat_the_optimizer_steps_with_the_anchor_of_the_first(small_config: Configured) -> None:
    changes = {"precision": {"preset": "fp32"}, "optimizer": {"learning_rate": 1e-12}}
    _, once = trained(small_config(**changes))
    _, thrice = trained(small_config(**changes, training={"epochs": 3}))
    assert [result.metrics["optim/updates_applied"] for result in once] == [2, 2]
    assert [result.metrics["optim/updates_applied"] for result in thrice] == [6, 6]
    # Weights stand still, so a ratio other than 1 would be that of another token's anchor.
    assert all(float(result.metrics["policy/ratio/max"] or 0) == pytest.approx(1, abs=1e-3) for result in thrice)
    assert thrice[0].metrics["mismatch/tokens"] == once[0].metrics["mismatch/tokens"]
    assert thrice[0].metrics["policy/loss"] == pytest.approx(once[0].metrics["policy/loss"], abs=1e-3)


def test_epochs_drift_and_keep_the_learning_rate_of_the_step(small_config: Configured) -> None:
    changes = {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 4}}
    once_weights, once = trained(small_config(**changes))
    weights, thrice = trained(small_config(**changes, training={"epochs": 3}))
    assert weights != once_weights
    rates = [[result.metrics["optim/learning_rate"] for result in results] for results in (once, thrice)]
    assert rates[0] == rates[1]
    assert float(thrice[0].metrics["policy/ratio/max"] or 0) > float(once[0].metrics["policy/ratio/max"] or 0)
