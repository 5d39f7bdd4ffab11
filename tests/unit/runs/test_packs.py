"""A step in many packs equals the step in one: metrics, budget, profile, denominators, loss, kept columns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from betterhalf.algorithms.denominators import train_denominators
from betterhalf.algorithms.loss_stats import LossStats, policy_metrics
from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import PRESETS, Algorithm, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs, MicroBatch, StepBatch
from betterhalf.config.schema import RunConfig
from betterhalf.runs.epochs import epochs
from betterhalf.runs.kept_rollouts import keep_rollouts
from betterhalf.runs.learn import learn
from betterhalf.runs.measure import Measured, anchored, mismatch
from betterhalf.training.pack import pack_step
from betterhalf.training.trainer import TokenScores
from betterhalf.types import Completion, FinishReason, Prompt, Rollout

LENGTHS = (3, 1, 9, 6, 2, 8, 4, 7, 5, 3, 9, 1)
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 2.0, -1.0, -1.0, 0.0]


def draws(*key: object, count: int, scale: float) -> list[float]:
    generator = random.Random(repr(key))
    return [generator.gauss(0, scale) for _ in range(count)]


def rollout(index: int) -> Rollout:
    """Return a rollout: siblings 0 to 3 of prompts 0 to 2, with the logprobs drawn for it."""
    logprobs = tuple(-1.0 - abs(x) for x in draws("mu", index, count=LENGTHS[index], scale=1.0))
    return Rollout(
        prompt=Prompt(prompt_id=str(index // 4), text="", token_ids=(50 + index // 4, 60), answer=""),
        completion=Completion(
            token_ids=tuple(range(LENGTHS[index])),
            behavior_logprobs=logprobs,
            finish_reason="stop",
            policy_version=0,
        ),
        text="",
        reward=0.0,
    )


ROLLOUTS = [rollout(index) for index in range(len(LENGTHS))]


def trainer_logprobs(index: int, what: str = "pi", scale: float = 0.5) -> list[float]:
    """Return the engine's logprobs plus a gap, drawn for each rollout, that does not average out over a completion.

    Two rollouts, one trained and one not, have almost no gap, so that every mask keeps something.
    """
    behavior = ROLLOUTS[index].completion.behavior_logprobs
    scale = scale if index % 5 < 4 else 1e-3
    bias = draws("bias", what, index, count=1, scale=scale)[0]
    noise = draws(what, index, count=len(behavior), scale=scale)
    return [x + bias + gap for x, gap in zip(behavior, noise, strict=True)]


def of_pack(pack: MicroBatch, values: Any) -> torch.Tensor:
    return torch.tensor([x for index in pack.rollout_index_S for x in values(index)])


def scored(batch: StepBatch) -> Measured:
    """Return the measured scores of the packs of a batch."""
    logprobs = [of_pack(pack, trainer_logprobs) for pack in batch.packs]
    scores = {index: TokenScores(logprobs_C=values, entropies_C=-values) for index, values in enumerate(logprobs)}
    return Measured(scores=scores, sample=tuple(scores))


def step(budget: int) -> tuple[StepBatch, Measured]:
    """Return the rollouts packed under a token budget, and their measured scores."""
    batch = pack_step(ROLLOUTS, ADVANTAGES, config_of(budget), 1)
    return batch, scored(batch)


def config_of(budget: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "training": {"tokens_per_micro_batch": budget, "optimizer_steps": 1},
            "sampling": {"max_tokens": 9},
            "logging": {"rollouts_per_step": len(ROLLOUTS)},
        }
    )


class MovedTrainer:
    """Trainer that computes the loss of logprobs that some updates have changed."""

    def forward_backward(
        self, packs: Sequence[MicroBatch], algorithm: Algorithm, denominators: Denominators
    ) -> LossStats:
        stats = LossStats.empty()
        for pack in packs:
            current = of_pack(pack, lambda index: trainer_logprobs(index, "moved", 0.3))
            stats += policy_loss(algorithm, LossInputs.of(pack, current), denominators).stats
        return stats

    def optim_step(self, rate: float) -> None:
        return None


WHOLE, PARTS = 1000, 12
"""Token budgets that give two packs (one trained, one only measured) and seven."""


def test_the_budgets_make_few_packs_and_many() -> None:
    assert [len(step(budget)[0].packs) for budget in (WHOLE, PARTS)] == [2, 7]


def one_pack() -> tuple[StepBatch, Measured]:
    """Return all rollouts in a single pack."""
    config = RunConfig.model_validate({"training": {"optimizer_steps": 1}, "sampling": {"max_tokens": 9}})
    batch = pack_step(ROLLOUTS, [1.0] * len(ROLLOUTS), config, 1)
    assert len(batch.packs) == 1
    return batch, scored(batch)


@pytest.mark.parametrize("budget", [WHOLE, PARTS])
def test_the_mismatch_of_many_packs_is_that_of_one(budget: int) -> None:
    expected, found = mismatch(*one_pack(), 9), mismatch(*step(budget), 9)
    assert expected.metrics["mismatch/tokens"] == sum(LENGTHS)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
    for ours, theirs in zip(sorted(found.profile.completions), sorted(expected.profile.completions), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for name in ("by_probability", "by_position"):
        for left, right in zip(getattr(found.profile, name), getattr(expected.profile, name), strict=True):
            assert asdict(left) == pytest.approx(asdict(right), rel=1e-6)


def test_the_sequence_metrics_are_those_of_the_completions() -> None:
    sums = [
        sum(trainer_logprobs(index)) - sum(ROLLOUTS[index].completion.behavior_logprobs)
        for index in range(len(ROLLOUTS))
    ]
    weights = torch.tensor(sums, dtype=torch.float64).exp()
    metrics = mismatch(*step(PARTS), 9).metrics
    assert metrics["mismatch/sequence_log_ratio/mean"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    ess = float(weights.sum() ** 2 / weights.square().sum()) / len(sums)
    assert metrics["mismatch/ess_fraction"] == pytest.approx(ess, rel=1e-5)
    assert metrics["budget/observed_ess"] == pytest.approx(ess, rel=1e-5)


@pytest.mark.parametrize("preset", ["icepop", "grpo_seq_mis", "geo_mask", "pg_seq_mis", "dppo_tv"])
def test_what_is_kept_in_many_packs_is_what_is_kept_in_one(preset: str) -> None:
    algorithm = replace(PRESETS[preset], denominator="kept")  # type: ignore[index]
    found = []
    for budget in (WHOLE, PARTS):
        batch = anchored(*step(budget))
        (train_batch,) = batch.train_batches
        found.append(train_denominators(algorithm, batch.chosen(train_batch.packs), train_batch.denominators))
    assert found[0] == found[1]
    assert found[0].tokens < sum(LENGTHS)


@pytest.mark.parametrize("denominator", ["all", "kept"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_and_its_counts_over_many_packs_are_those_over_few(preset: str, denominator: str) -> None:
    algorithm = replace(PRESETS[preset], denominator=denominator)  # type: ignore[index,arg-type]
    found = []
    for budget in (WHOLE, PARTS):
        batch = anchored(*step(budget))
        trainer: Any = MovedTrainer()
        found.append(policy_metrics(learn(trainer, algorithm, batch, batch.train_batches[0], 0.0).stats))
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[0]["policy/loss"] != 0
    assert found[0]["policy/ratio/max"] >= found[0]["policy/ratio/mean"] > 0


@pytest.mark.parametrize("budget", [WHOLE, PARTS])
def test_kept_rollouts_have_their_own_columns_whatever_pack_they_were_in(budget: int) -> None:
    kept = keep_rollouts(ROLLOUTS, ADVANTAGES, *step(budget), config_of(budget), 1)
    assert [row.rollout for row in kept] == ROLLOUTS
    assert [row.advantage for row in kept] == ADVANTAGES
    for index, row in enumerate(kept):
        assert row.trainer_logprobs == pytest.approx(trainer_logprobs(index), rel=1e-6)


def test_masked_completions_leave_the_denominators_of_kept_and_stay_in_those_of_all() -> None:
    reasons: list[FinishReason] = ["length" if index in (2, 6) else "stop" for index in range(len(ROLLOUTS))]
    rollouts = [
        replace(one, completion=replace(one.completion, finish_reason=reason))
        for one, reason in zip(ROLLOUTS, reasons, strict=True)
    ]
    config = RunConfig.model_validate(
        {
            "training": {"optimizer_steps": 1},
            "sampling": {"max_tokens": 9},
            "algorithm": {"mask_truncated": True, "denominator": "kept"},
        }
    )
    batch = pack_step(rollouts, ADVANTAGES, config, 1)
    batch = anchored(batch, scored(batch))
    (train_batch,) = batch.train_batches
    countable = batch.chosen(train_batch.countable)
    kept = train_denominators(resolve_algorithm(config.algorithm), countable, train_batch.denominators)
    assert (kept.sequences, kept.tokens) == (10, sum(LENGTHS) - LENGTHS[2] - LENGTHS[6])
    every = train_denominators(PRESETS["grpo"], countable, train_batch.denominators)
    assert (every.sequences, every.tokens) == (12, sum(LENGTHS))


def test_later_epochs_have_the_logprobs_of_the_first_by_rollout() -> None:
    config = config_of(PARTS).model_copy(update={"training": config_of(PARTS).training.model_copy(update=THREE)})
    batch, measured = step(PARTS)
    passes = list(epochs(anchored(batch, measured), ROLLOUTS, ADVANTAGES, config, 1))
    assert len(passes) == 3 and repr(passes[0]) == repr(anchored(batch, measured))
    for later in passes[1:]:
        assert [p.rollout_index_S for p in later.packs] != [p.rollout_index_S for p in batch.packs]
        for pack in later.packs:
            assert pack.proximal_logprobs_C is not None
            assert torch.equal(pack.proximal_logprobs_C, of_pack(pack, trainer_logprobs))


def test_later_epochs_lack_what_the_first_did_not_measure() -> None:
    config = config_of(PARTS).model_copy(update={"training": config_of(PARTS).training.model_copy(update=THREE)})
    batch, measured = step(PARTS)
    some = replace(measured, scores={0: measured.scores[0]})
    known = set(batch.packs[0].rollout_index_S)
    for later in list(epochs(anchored(batch, some), ROLLOUTS, ADVANTAGES, config, 1))[1:]:
        for pack in later.packs:
            assert (pack.proximal_logprobs_C is not None) == (set(pack.rollout_index_S) <= known)


THREE = {"epochs": 3}
