"""Single steps: dynamic sampling, the overlong penalty, `kept` denominators, pass@k."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from betterhalf.algorithms.advantage import rollout_advantages
from betterhalf.algorithms.denominators import train_denominators
from betterhalf.config.schema import EvaluateConfig, RunConfig
from betterhalf.errors import ConfigError
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.collect import Collected, collect_groups
from betterhalf.runs.evaluation import PromptResult, average_reward, estimates
from betterhalf.runs.measure import anchor_packs, anchored, measure, measure_also, mismatch
from betterhalf.runs.progress import Progress
from betterhalf.runs.step_metrics import rollout_metrics
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.weight_sync import sync_weights
from betterhalf.training.pack import pack_step
from betterhalf.types import FinishReason, Prompt, RolloutGroup

Configured = Callable[..., RunConfig]


@pytest.fixture
def build(small_config: Configured) -> Iterator[Callable[..., Parts]]:
    """Assemble and sync parts, and close them at the end."""
    made: list[Parts] = []

    def make(**changes: Any) -> Parts:
        made.append(assemble(small_config(**changes)))
        sync_weights(made[-1])
        return made[-1]

    yield make
    for parts in made:
        parts.close()


class EveryOtherPromptIsFlat:
    """Task whose prompts 0, 2, 4 ... give all siblings the same reward."""

    timeouts = 0
    unparsed_answers = 0

    def __init__(self, base: Any) -> None:
        self.base = base
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.base)

    def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
        self.asked.append((position, count))
        return [replace(self.base.prompt(i), prompt_id=str(i)) for i in range(position, position + count)]

    def rewards(self, prompts: list[Prompt], texts: list[str], reasons: list[FinishReason]) -> list[float]:
        return [float(i % 2) if int(prompt.prompt_id) % 2 else 1.0 for i, prompt in enumerate(prompts)]

    def close(self) -> None:
        self.base.close()


def collected_at(parts: Parts, position: int = 0) -> Collected:
    """Return the groups of the first step after `position` consumed prompts."""
    return collect_groups(parts, Progress(position=position), Stopwatch(torch.device("cpu")))


def advantages_of(parts: Parts, collected: Collected) -> list[float]:
    return rollout_advantages(collected.groups, parts.algorithm, parts.config.sampling.max_tokens)


def test_dynamic_sampling_replaces_flat_groups_by_fresh_prompts(build: Callable[..., Parts]) -> None:
    parts = build(algorithm={"preset": "dapo", "overlong_buffer": 0})
    task = EveryOtherPromptIsFlat(parts.task)
    collected = collected_at(replace(parts, task=task))  # type: ignore[arg-type]
    # 4 wanted; two rounds of 4 prompts hold 4 useful ones: 1, 3, 5, 7
    assert [group.prompt.prompt_id for group in collected.groups] == ["1", "3", "5", "7"]
    assert task.asked == [(0, 4), (0, 8)]  # the second round must not repeat prompts of the first
    assert collected.position == 8
    assert (collected.dropped, collected.surplus) == (4, 0)


@pytest.mark.parametrize(("num_prompts", "distinct"), [(14, 12), (9, 8), (4, 4)])
def test_no_round_of_a_step_repeats_a_prompt_while_there_are_others(
    build: Callable[..., Parts], num_prompts: int, distinct: int
) -> None:
    parts = build(algorithm={"preset": "dapo"}, task={"num_prompts": num_prompts})

    class AllRight(EveryOtherPromptIsFlat):
        def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
            return self.base.prompts(position, count, seed)  # type: ignore[no-any-return]

        def rewards(self, prompts: list[Prompt], texts: list[str], reasons: list[FinishReason]) -> list[float]:
            return [1.0] * len(prompts)

    for position in {0, num_prompts - 1, max(0, num_prompts - 6)}:
        collected = collected_at(replace(parts, task=AllRight(parts.task)), position)  # type: ignore[arg-type]
        names = [group.prompt.prompt_id for group in collected.sampled]
        rounds = [set(names[start : start + 4]) for start in range(0, 12, 4)]
        assert len(names) == 12 and all(len(some) == 4 for some in rounds)
        assert len(set(names[:distinct])) == distinct


class FlatAtSome(EveryOtherPromptIsFlat):
    """Task whose `flat` prompts are solved by all siblings, and the others by every second one."""

    def __init__(self, base: Any, *flat: int) -> None:
        super().__init__(base)
        self.flat = flat

    def rewards(self, prompts: list[Prompt], texts: list[str], reasons: list[FinishReason]) -> list[float]:
        return [1.0 if int(p.prompt_id) in self.flat else float(i % 2) for i, p in enumerate(prompts)]


def sampled_dynamically(parts: Parts, *flat: int) -> Collected:
    """Return the groups of the first step if these prompts are flat."""
    return collected_at(replace(parts, task=FlatAtSome(parts.task, *flat)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flat", "kept", "dropped", "surplus"),
    [
        ((3,), ["0", "1", "2", "4"], 1, 3),  # three useful and one flat, then four useful
        ((), ["0", "1", "2", "3"], 0, 0),
        ((0, 1, 2, 3, 4, 5), ["6", "7", "8", "9"], 6, 2),
        (tuple(range(11)), ["11", "0", "1", "2"], 8, 0),  # after the last round, three flat groups fill the step
    ],
)
def test_dropped_and_surplus_groups_are_counted_apart(
    build: Callable[..., Parts], flat: tuple[int, ...], kept: list[str], dropped: int, surplus: int
) -> None:
    parts = build(algorithm={"preset": "dapo", "overlong_buffer": 0})
    collected = sampled_dynamically(parts, *flat)
    metrics = rollout_metrics(collected, advantages_of(parts, collected))
    assert [group.prompt.prompt_id for group in collected.groups] == kept
    assert (metrics["rollout/groups_dropped"], metrics["rollout/groups_surplus"]) == (dropped, surplus)
    sampled = 4 + dropped + surplus
    assert len(collected.sampled) == sampled == collected.position
    assert metrics["rollout/reward/mean"] == (len(flat) + (sampled - len(flat)) / 2) / sampled
    assert metrics["rollout/zero_advantage_fraction"] == len(flat) / sampled
    fillers = len(flat) - dropped
    assert metrics["rollout/kept/reward/mean"] == (fillers + (4 - fillers) / 2) / 4
    assert metrics["rollout/kept/zero_advantage_fraction"] == fillers / 4


def test_what_dynamic_sampling_leaves_out_is_measured_and_changes_nothing_else(
    build: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step(leave_out: bool) -> tuple[dict[str, Any], Collected, torch.Tensor]:
        parts = build(algorithm={"preset": "dapo"}, training={"tokens_per_micro_batch": 120})
        collected = sampled_dynamically(parts, 0, 1, 2, 3, 4, 5)
        shown = collected if leave_out else replace(collected, left_out=())
        monkeypatch.setattr(loop, "collect_groups", lambda *_: shown)
        metrics = loop.train_step(parts, Progress()).metrics
        return metrics, collected, next(iter(parts.trainer.weights.masters.values())).detach().clone()

    found, collected, weights = one_step(leave_out=True)
    plain, _, expected = one_step(leave_out=False)
    assert found["mismatch/tokens"] == collected.tokens > plain["mismatch/tokens"] == collected.kept_tokens
    assert torch.equal(weights, expected)
    unmoved = [key for key in plain if key.startswith(("policy/", "optim/", "rollout/kept/")) and "entropy" not in key]
    assert {key: found[key] for key in unmoved} == {key: plain[key] for key in unmoved}
    ratio = found["system/kept_tokens_per_second"] / found["system/tokens_per_second"]
    assert ratio == pytest.approx(collected.kept_tokens / collected.tokens)


def test_completions_that_were_left_out_also_say_whether_anything_ends(
    build: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(group: RolloutGroup) -> RolloutGroup:
        rollouts = (replace(r, completion=replace(r.completion, finish_reason="length")) for r in group.rollouts)
        return replace(group, rollouts=tuple(rollouts))

    parts = build(algorithm={"preset": "dapo", "overlong_buffer": 0})
    collected = sampled_dynamically(parts, 3)
    assert collected.left_out
    kept = replace(collected, groups=tuple(map(cut_off, collected.groups)))
    both = replace(kept, left_out=tuple(map(cut_off, collected.left_out)))
    notes = []
    for shown in (kept, both):
        monkeypatch.setattr(loop, "collect_groups", lambda *_, shown=shown: shown)
        notes.append(loop.train_step(parts, Progress()).truncation)
    assert notes[0] is None
    assert notes[1] is not None and notes[1].startswith("all 32 completions were cut off")


def test_a_step_without_dynamic_sampling_trains_on_all_it_samples(build: Callable[..., Parts]) -> None:
    metrics = loop.train_step(build(), Progress()).metrics
    kept = {key: value for key, value in metrics.items() if key.startswith("rollout/kept/")}
    assert len(kept) == 6
    assert kept == {key: metrics[key.replace("kept/", "")] for key in kept}
    assert metrics["system/kept_tokens_per_second"] == metrics["system/tokens_per_second"]


def test_without_dynamic_sampling_flat_groups_stay(build: Callable[..., Parts]) -> None:
    parts = build()
    task = EveryOtherPromptIsFlat(parts.task)
    collected = collected_at(replace(parts, task=task))  # type: ignore[arg-type]
    assert [group.prompt.prompt_id for group in collected.groups] == ["0", "1", "2", "3"]
    advantages = advantages_of(parts, collected)
    assert advantages == [0, 0, 0, 0, -0.5, 0.5, -0.5, 0.5, 0, 0, 0, 0, -0.5, 0.5, -0.5, 0.5]
    metrics = rollout_metrics(collected, advantages)
    assert metrics["rollout/zero_advantage_fraction"] == 0.5
    assert metrics["rollout/reward/mean"] == 0.75


def a_group(parts: Parts, rewards: Sequence[float], lengths: Sequence[int]) -> Collected:
    """Return one group with these rewards and lengths of completions."""
    (group, *_) = collected_at(parts).groups
    rollouts = tuple(
        replace(
            rollout,
            reward=reward,
            completion=replace(rollout.completion, token_ids=(1,) * n, behavior_logprobs=(0.0,) * n),
        )
        for rollout, reward, n in zip(group.rollouts, rewards, lengths, strict=True)
    )
    return Collected(groups=(replace(group, rollouts=rollouts),), position=1, timeouts=0)


def test_the_overlong_penalty_enters_the_advantage_but_not_the_reward(build: Callable[..., Parts]) -> None:
    parts = build(algorithm={"preset": "grpo", "overlong_buffer": 10})
    one = a_group(parts, (1.0,) * 4, (30, 35, 40, 32))
    # limit 40, buffer 10, factor 0.5: penalties 0, -0.25, -0.5, -0.1, mean -0.2125
    assert advantages_of(parts, one) == pytest.approx([0.2125, -0.0375, -0.2875, 0.1125])
    assert rollout_metrics(one, [0.0] * 4)["rollout/reward/mean"] == 1.0


def test_dapo_weighs_the_overlong_penalty_as_its_source_does(build: Callable[..., Parts]) -> None:
    parts = build(algorithm={"preset": "dapo"})
    # right and short, right at the limit, wrong and short, wrong at the limit
    one = a_group(parts, (1.0, 1.0, 0.0, 0.0), (10, 40, 10, 40))
    assert advantages_of(parts, one) == pytest.approx([1.16, 0.39, -0.39, -1.16], abs=0.005)


@pytest.mark.parametrize("advantage", ["group_standardised", "raw"])
def test_groups_of_equal_rewards_that_fill_a_step_have_no_advantage(
    build: Callable[..., Parts], advantage: str
) -> None:
    parts = build(algorithm={"preset": "dapo", "advantage": advantage})
    one = a_group(parts, (1.0,) * 4, (30, 31, 32, 33))  # the penalty starts at 32 of 40
    assert advantages_of(parts, one) == [0.0] * 4
    metrics = rollout_metrics(one, advantages_of(parts, one))
    assert metrics["rollout/zero_advantage_fraction"] == 1.0


def test_kept_denominators_leave_rejected_tokens_out(build: Callable[..., Parts]) -> None:
    parts = build(algorithm={"preset": "icepop", "denominator": "kept", "aggregation": "token_mean"})
    collected = collected_at(parts)
    advantages = advantages_of(parts, collected)
    batch = pack_step(collected.rollouts, advantages, parts.config, 1)
    train_batch = batch.train_batches[0]
    measured = measure_also(parts.trainer, batch, measure(parts.trainer, batch, parts.config, 1), train_batch.packs)
    batch = anchored(batch, measured)
    rejected = 0
    for pack in batch.chosen(train_batch.packs):
        pack.behavior_logprobs_C[:3] -= 5.0  # a ratio of exp(5), outside IcePop's 0.5 to 5
        rejected += 3
    found = train_denominators(parts.algorithm, batch.chosen(train_batch.packs), train_batch.denominators)
    assert found.tokens == train_batch.denominators.tokens - rejected
    assert found.sequences == train_batch.denominators.sequences


def test_a_sample_of_the_mismatch_is_not_biased_by_what_trains(build: Callable[..., Parts]) -> None:
    parts = build(mismatch={"sample_fraction": 0.4}, training={"tokens_per_micro_batch": 120})
    collected = collected_at(parts)
    advantages = advantages_of(parts, collected)
    batch = pack_step(collected.rollouts, advantages, parts.config, 1)
    measured = measure(parts.trainer, batch, parts.config, 1)
    measured = measure_also(parts.trainer, batch, measured, anchor_packs(parts.algorithm, batch))
    trained = {index for b in batch.train_batches for index in b.micro_batches}
    assert trained <= set(measured.scores)  # the anchor of every trained pack
    assert len(measured.sample) == round(0.4 * len(batch.packs))
    tokens = sum(pack.target_ids_C.numel() for pack in batch.chosen(measured.sample))
    gap = mismatch(batch, measured, parts.config.sampling.max_tokens)
    assert gap.metrics["mismatch/tokens"] == sum(b.tokens for b in gap.profile.by_position) == tokens


def test_an_overlong_buffer_beyond_the_limit_is_found_before_anything_runs(small_config: Configured) -> None:
    with pytest.raises(ConfigError, match="overlong_buffer=100 exceeds"):
        assemble(small_config(algorithm={"preset": "grpo", "overlong_buffer": 100}))


def score(solved: int, samples: int) -> PromptResult:
    return PromptResult(
        prompt_id="", solved=solved, samples=samples, reward=solved / samples, truncated=0, tokens=samples
    )


def test_pass_at_k_by_hand() -> None:
    scores = [score(1, 4), score(4, 4), score(0, 4)]
    found = {name: each.value for name, each in estimates(scores, EvaluateConfig(samples=4), seed=0).items()}
    assert average_reward(scores) == found["avg@4"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert found["pass@1"] == pytest.approx((0.25 + 1 + 0) / 3)
    # one of four solved: 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
    assert found["pass@2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["pass@4"] == pytest.approx((1 + 1 + 0) / 3)


def test_all_groups_flat_still_takes_the_optimizer_steps_and_logs_every_metric(build: Callable[..., Parts]) -> None:
    parts = build()

    class AllRight(EveryOtherPromptIsFlat):
        def rewards(self, prompts: list[Prompt], texts: list[str], reasons: list[FinishReason]) -> list[float]:
            return [1.0] * len(prompts)

    flat = replace(parts, task=AllRight(parts.task))  # type: ignore[arg-type]
    result = loop.train_step(flat, Progress())
    assert result.metrics["rollout/zero_advantage_fraction"] == 1.0
    assert result.metrics["optim/updates_applied"] == 2
    assert result.metrics["policy/loss"] == 0.0
    assert result.metrics["optim/grad_norm"] == 0.0
    assert result.metrics["mismatch/tokens"] > 0  # type: ignore[operator]
    assert torch.isfinite(next(iter(parts.trainer.weights.masters.values()))).all()
