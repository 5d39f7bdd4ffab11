"""Single steps: dynamic sampling, the overlong penalty, denominators of what is kept, pass@k."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.collect import Collected, collect_groups
from betterhalf.runs.evaluate import PromptScore, average_reward, pass_at
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.weight_sync import sync_weights
from betterhalf.training.pack import pack_step
from betterhalf.types import FinishReason, Prompt

Configured = Callable[..., RunConfig]


@pytest.fixture
def build(small_config: Configured) -> Iterator[Callable[..., Parts]]:
    """Assembled and synced parts, closed at the end."""
    made: list[Parts] = []

    def make(**changes: Any) -> Parts:
        made.append(assemble(small_config(**changes)))
        sync_weights(made[-1])
        return made[-1]

    yield make
    for parts in made:
        parts.close()


class EveryOtherPromptIsFlat:
    """A task whose prompts 0, 2, 4 ... give all siblings the same reward."""

    timeouts = 0
    unparsed_answers = 0

    def __init__(self, base: Any) -> None:
        self.base = base
        self.asked: list[int] = []

    def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
        self.asked.append(position)
        return [replace(self.base.prompt(i), prompt_id=str(i)) for i in range(position, position + count)]

    def rewards(self, prompts: list[Prompt], texts: list[str], reasons: list[FinishReason]) -> list[float]:
        return [float(i % 2) if int(prompt.prompt_id) % 2 else 1.0 for i, prompt in enumerate(prompts)]

    def close(self) -> None:
        self.base.close()


def test_dynamic_sampling_replaces_flat_groups_by_fresh_prompts(build: Callable[..., Parts]) -> None:
    parts = build(algorithm={"preset": "dapo", "overlong_buffer": 0})
    task = EveryOtherPromptIsFlat(parts.task)
    collected = collect_groups(replace(parts, task=task), 1, 0, Stopwatch())  # type: ignore[arg-type]
    # 4 wanted; two rounds of 4 prompts hold 4 useful ones: 1, 3, 5, 7
    assert [group.prompt.prompt_id for group in collected.groups] == ["1", "3", "5", "7"]
    assert task.asked == [0, 4]
    assert collected.position == 8
    assert collected.dropped == 4


def test_without_dynamic_sampling_flat_groups_stay(build: Callable[..., Parts]) -> None:
    parts = build()
    task = EveryOtherPromptIsFlat(parts.task)
    collected = collect_groups(replace(parts, task=task), 1, 0, Stopwatch())  # type: ignore[arg-type]
    assert [group.prompt.prompt_id for group in collected.groups] == ["0", "1", "2", "3"]
    advantages = loop.step_advantages(parts, collected)
    assert advantages == [0, 0, 0, 0, -0.5, 0.5, -0.5, 0.5, 0, 0, 0, 0, -0.5, 0.5, -0.5, 0.5]
    metrics = loop.rollout_metrics(parts, collected, advantages)
    assert metrics["rollout/zero_advantage_fraction"] == 0.5
    assert metrics["rollout/reward/mean"] == 0.75


def test_the_overlong_penalty_enters_the_advantage_but_not_the_reward(build: Callable[..., Parts]) -> None:
    parts = build(algorithm={"preset": "grpo", "overlong_buffer": 10})
    collected = collect_groups(parts, 1, 0, Stopwatch())
    (group, *_) = collected.groups
    lengths = (30, 35, 40, 32)
    rollouts = tuple(
        replace(
            rollout,
            reward=1.0,
            completion=replace(rollout.completion, token_ids=(1,) * n, behavior_logprobs=(0.0,) * n),
        )
        for rollout, n in zip(group.rollouts, lengths, strict=True)
    )
    one = Collected(groups=(replace(group, rollouts=rollouts),), position=1, dropped=0, timeouts=0)
    # limit 40, buffer 10: penalties 0, -0.5, -1, -0.2, mean -0.425
    assert loop.step_advantages(parts, one) == pytest.approx([0.425, -0.075, -0.575, 0.225])
    assert loop.rollout_metrics(parts, one, [0.0] * 4)["rollout/reward/mean"] == 1.0


def test_kept_denominators_leave_rejected_tokens_out(build: Callable[..., Parts]) -> None:
    parts = build(algorithm={"preset": "icepop", "denominator": "kept", "aggregation": "token_mean"})
    collected = collect_groups(parts, 1, 0, Stopwatch())
    advantages = loop.step_advantages(parts, collected)
    batch = pack_step(collected.rollouts, advantages, parts.config, 1, parts.policy.device)
    measured = loop.measure(parts, batch, 1)
    train_batch = batch.train_batches[0]
    rejected = 0
    for pack in train_batch.packs:
        pack.behavior_logprobs_C[:3] -= 5.0  # a ratio of exp(5), outside IcePop's 0.5 to 5
        rejected += 3
    found = loop.step_denominators(parts, train_batch, measured)
    assert found.tokens == train_batch.denominators.tokens - rejected
    assert found.sequences == train_batch.denominators.sequences


def test_a_sample_of_the_mismatch_is_not_biased_by_what_trains(build: Callable[..., Parts]) -> None:
    parts = build(mismatch={"sample_fraction": 0.4}, training={"tokens_per_micro_batch": 120})
    collected = collect_groups(parts, 1, 0, Stopwatch())
    advantages = loop.step_advantages(parts, collected)
    batch = pack_step(collected.rollouts, advantages, parts.config, 1, parts.policy.device)
    measured = loop.with_anchors(parts, batch, loop.measure(parts, batch, 1))
    trained = {id(pack) for b in batch.train_batches for pack in b.micro_batches}
    assert trained <= set(measured.logprobs)  # the anchor of every trained pack
    assert len(measured.packs) == round(0.4 * len(batch.packs))
    tokens = sum(pack.target_ids_C.numel() for pack in measured.packs)
    gap = loop.mismatch(measured, parts.config.sampling.max_tokens)
    assert gap.metrics["mismatch/tokens"] == sum(b.tokens for b in gap.profile.by_position) == tokens


def test_an_overlong_buffer_beyond_the_limit_is_found_before_anything_runs(small_config: Configured) -> None:
    with pytest.raises(ConfigError, match="overlong_buffer=100 exceeds"):
        assemble(small_config(algorithm={"preset": "grpo", "overlong_buffer": 100}))


def score(solved: int, samples: int) -> PromptScore:
    return PromptScore(
        prompt_id="", solved=solved, samples=samples, reward=solved / samples, truncated=0, tokens=samples
    )


def test_pass_at_k_by_hand() -> None:
    scores = [score(1, 4), score(4, 4), score(0, 4)]
    assert average_reward(scores) == pytest.approx((0.25 + 1 + 0) / 3)
    assert pass_at(scores, 1) == pytest.approx((0.25 + 1 + 0) / 3)
    # one of four solved: 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
    assert pass_at(scores, 2) == pytest.approx((0.5 + 1 + 0) / 3)
    assert pass_at(scores, 4) == pytest.approx((1 + 1 + 0) / 3)


def test_all_groups_flat_still_takes_the_optimizer_steps_and_logs_every_metric(build: Callable[..., Parts]) -> None:
    parts = build()

    class AllRight(EveryOtherPromptIsFlat):
        def rewards(self, prompts: list[Prompt], texts: list[str], reasons: list[FinishReason]) -> list[float]:
            return [1.0] * len(prompts)

    flat = replace(parts, task=AllRight(parts.task))  # type: ignore[arg-type]
    result = loop.train_step(flat, loop.Progress())
    assert result.metrics["rollout/zero_advantage_fraction"] == 1.0
    assert result.metrics["optim/updates_applied"] == 2
    assert result.metrics["policy/loss"] == 0.0
    assert result.metrics["optim/grad_norm"] == 0.0
    assert result.metrics["mismatch/tokens"] > 0  # type: ignore[operator]
    assert torch.isfinite(next(iter(parts.trainer.weights.masters.values()))).all()
