"""Collect the rollout groups of a step: prompts, completions, rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from betterhalf.metrics.console import show_note
from betterhalf.rollout.build import reports_experts
from betterhalf.rollout.engine import require_experts, require_supports, require_version, take_restarts
from betterhalf.rollout.restarts import Restarts
from betterhalf.runs.assembly import Parts
from betterhalf.runs.progress import Progress
from betterhalf.runs.recovery import restarts_of, retry_on_engine_death
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.turns import Player
from betterhalf.runs.weight_sync import revive
from betterhalf.setup.decoding import completion_texts
from betterhalf.tasks.rewards import check_rewards
from betterhalf.tasks.task import Measured
from betterhalf.tasks.turns import turns_of
from betterhalf.types import Completion, GenerateRequest, Prompt, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Groups of one step."""

    groups: tuple[RolloutGroup, ...]
    """Groups that the step trains on, `prompts_per_step` of them."""
    left_out: tuple[RolloutGroup, ...] = ()
    """Groups that dynamic sampling replaced, or sampled beyond the size of the step: measured, but not trained on."""
    position: int
    """Number of prompts consumed since the start of the run; the next step starts there."""
    timeouts: int
    """Number of rewards that ran out of time in this step."""
    unparsed_answers: int = 0
    """Number of answers in this step that the grader could not parse."""
    restarts: int = 0
    """Number of restarts of the engine after a crash while sampling."""
    task_metrics: Mapping[str, float] = field(default_factory=dict)
    """The task's own metrics of this step, under `task/`."""
    environment_failures: int | None = None
    """Number of calls of the environment in this step that failed; None without an environment."""
    policy_version: int = 0
    """Version of the weights that sampled."""
    ahead_seconds: float | None = None
    """Seconds of sampling and grading in the background, 0 if the step waited for all of it; None if a run never
    samples ahead."""

    @property
    def rollouts(self) -> list[Rollout]:
        """Rollouts of the step's own groups: groups in order, siblings in order."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def left_out_rollouts(self) -> list[Rollout]:
        """Rollouts of the groups that are left out."""
        return [rollout for group in self.left_out for rollout in group.rollouts]

    @property
    def sampled(self) -> tuple[RolloutGroup, ...]:
        """Everything the engine sampled: the step's own groups, then those left out."""
        return self.groups + self.left_out

    @property
    def dropped(self) -> int:
        """Number of groups left out because all their rewards were equal."""
        return sum(not has_signal(group) for group in self.left_out)

    @property
    def surplus(self) -> int:
        """Number of groups left out although their rewards differ: the step was full."""
        return len(self.left_out) - self.dropped

    @property
    def kept_tokens(self) -> int:
        """Number of completion tokens in the step's own groups."""
        return _tokens(self.rollouts)

    @property
    def tokens(self) -> int:
        """Number of completion tokens that the engine sampled."""
        return self.kept_tokens + _tokens(self.left_out_rollouts)


def has_signal(group: RolloutGroup) -> bool:
    """Return whether the rewards of the siblings differ."""
    return len(set(group.rewards)) > 1


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.completion.token_ids) for rollout in rollouts)


def collect_groups(parts: Parts, progress: Progress, clock: Stopwatch) -> Collected:
    """Sample and grade the groups of the step after `progress`, with the weights of its policy version.

    With `dynamic_sampling` (arXiv 2503.14476), groups whose rewards are all equal are replaced by groups of fresh
    prompts, for at most `max_sampling_rounds` rounds. If groups are still missing then, groups of equal rewards fill
    the step up, so that it always has its size. Groups that were sampled and are not in the step are left out of
    training, and measured. Errors are those of `sample_groups`.
    """
    wanted, start = parts.config.training.prompts_per_step, progress.position
    position = start
    rounds = parts.algorithm.max_sampling_rounds if parts.algorithm.dynamic_sampling else 1
    useful: list[RolloutGroup] = []
    flat: list[RolloutGroup] = []
    timeouts_before, unparsed_before = parts.task.timeouts, parts.task.unparsed_answers
    _task_metrics(parts)  # those of an evaluation before this step are not the step's
    turns = turns_of(parts.task)
    failures_before = turns.failures if turns else 0
    restarts, size = restarts_of(parts.config), parts.config.training.group_size
    for _ in range(rounds):
        prompts = _fresh_prompts(parts, start, position - start)
        groups = sample_groups(
            parts,
            prompts,
            size,
            step=progress.step + 1,
            policy_version=progress.policy_version,
            first_index=len(useful + flat),
            clock=clock,
            restarts=restarts,
            trains=True,
        )
        for group in groups:
            (useful if has_signal(group) or not parts.algorithm.dynamic_sampling else flat).append(group)
        position += wanted
        if len(useful) >= wanted:
            break
    sampled = (*useful, *flat)
    return Collected(
        groups=sampled[:wanted],
        left_out=sampled[wanted:],
        position=position,
        timeouts=parts.task.timeouts - timeouts_before,
        unparsed_answers=parts.task.unparsed_answers - unparsed_before,
        restarts=restarts.count + take_restarts(parts.engine),
        task_metrics=_task_metrics(parts),
        environment_failures=turns.failures - failures_before if turns else None,
        policy_version=progress.policy_version,
    )


def _task_metrics(parts: Parts) -> dict[str, float]:
    return parts.task.take_metrics() if isinstance(parts.task, Measured) else {}


def _fresh_prompts(parts: Parts, start: int, taken: int) -> list[Prompt]:
    """Return the next prompts of a step that has `taken` already; none repeats if the data set is large enough."""
    count, seed = parts.config.training.prompts_per_step, parts.config.seed
    if taken + count > len(parts.task):
        return parts.task.prompts(start + taken, count, seed)
    return parts.task.prompts(start, taken + count, seed)[taken:]


def sample_groups(
    parts: Parts,
    prompts: Sequence[Prompt],
    group_size: int,
    *,
    step: int,
    policy_version: int,
    first_index: int,
    clock: Stopwatch,
    restarts: Restarts | None = None,
    trains: bool = False,
) -> list[RolloutGroup]:
    """Sample and grade completions of some prompts, of all turns; (seed, step, index) determines every draw.

    If the engine's process crashes, a new one samples the same completions.

    Args:
        parts: engine, task and settings.
        prompts: one for each group.
        group_size: number of completions of each prompt.
        step: step in the random key.
        policy_version: version that the completions must have: that of the last weight sync.
        first_index: index of the first prompt in the random key.
        clock: records the seconds of `generate` and `reward`.
        restarts: counts and limits the restarts of the engine; by default, in this call alone.
        trains: True if the trainer will score the completions: truncated ones then come with their support.

    Raises:
        EngineDiedError: the engine crashed once more often than it may be restarted.
        EngineError: the engine sampled with other weights than the trainer's, or left out a support or the experts.
        RewardError: a reward is not finite, or the number of rewards is wrong.
    """
    counted = restarts or restarts_of(parts.config)

    def sample(requests: list[GenerateRequest]) -> list[tuple[Completion, ...]]:
        with clock("generate"):
            siblings = _generate(parts, requests, policy_version, counted)
            if trains:
                require_supports(siblings, parts.config.sampling)
            if trains and parts.config.algorithm.routing_replay:
                require_experts(requests, siblings)
            return siblings

    requests = [
        GenerateRequest(
            token_ids=prompt.token_ids,
            group_size=group_size,
            key=(parts.config.seed, step, first_index + index),
            prompt_id=prompt.prompt_id,
            with_support=trains,
            with_experts=trains and reports_experts(parts.config, parts.model),
        )
        for index, prompt in enumerate(prompts)
    ]
    turns = turns_of(parts.task)
    if turns is not None:
        return Player(parts=parts, turns=turns, sample=sample, clock=clock).groups(prompts, requests)
    siblings = sample(requests)
    with clock("reward"):
        return _graded(parts, prompts, siblings)


def _generate(
    parts: Parts, requests: list[GenerateRequest], policy_version: int, restarts: Restarts
) -> list[tuple[Completion, ...]]:
    def sample() -> list[tuple[Completion, ...]]:
        # The last step may have left the engine asleep: without an update there was no sync to wake it.
        parts.engine.wake()
        return parts.engine.generate(requests, parts.config.sampling)

    siblings = retry_on_engine_death(sample, lambda: revive(parts), restarts)
    require_version(siblings, policy_version)
    return siblings


def _graded(parts: Parts, prompts: Sequence[Prompt], siblings: Sequence[tuple[Completion, ...]]) -> list[RolloutGroup]:
    flat = [(prompt, completion) for prompt, group in zip(prompts, siblings, strict=True) for completion in group]
    texts = completion_texts(parts.model.tokenizer, [completion for _, completion in flat])
    rewards = parts.task.rewards([prompt for prompt, _ in flat], texts, [c.finish_reason for _, c in flat])
    rewards = check_rewards(rewards, len(flat))
    for note in parts.task.take_notes() if isinstance(parts.task, Measured) else ():
        show_note(note, mode=parts.config.logging.console)
    rollouts = iter(
        [
            Rollout(prompt=prompt, completion=completion, text=text, reward=reward)
            for (prompt, completion), text, reward in zip(flat, texts, rewards, strict=True)
        ]
    )
    return [
        RolloutGroup(prompt=prompt, rollouts=tuple(next(rollouts) for _ in group))
        for prompt, group in zip(prompts, siblings, strict=True)
    ]
