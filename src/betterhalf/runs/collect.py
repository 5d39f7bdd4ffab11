"""Fill a step with rollout groups: prompts, completions, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from betterhalf.runs.assembly import Parts
from betterhalf.runs.decoding import completion_texts
from betterhalf.runs.recovery import Restarts, restarts_of, surviving
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.weight_sync import revive
from betterhalf.tasks.rewards import check_rewards
from betterhalf.types import Completion, GenerateRequest, Prompt, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The groups of one step."""

    groups: tuple[RolloutGroup, ...]
    """`prompts_per_step` of them."""
    position: int
    """Prompts consumed since the start of the run: where the next step goes on."""
    dropped: int
    """Groups thrown away by dynamic sampling because all their rewards were equal."""
    timeouts: int
    """Rewards that ran out of time in this step."""
    unparsed_answers: int = 0
    """Answers of this step that the grader could not read."""
    restarts: int = 0
    """Times the engine died while sampling and was started again."""

    @property
    def rollouts(self) -> list[Rollout]:
        """Groups in order, siblings in order."""
        return [rollout for group in self.groups for rollout in group.rollouts]


def collect_groups(parts: Parts, step: int, position: int, clock: Stopwatch) -> Collected:
    """Sample and score one step's groups.

    With `dynamic_sampling` (arXiv 2503.14476), groups without a difference in reward are replaced by fresh prompts, for
    at most `max_sampling_rounds` rounds; what is then still missing is filled up with groups of equal rewards, so that
    a step always has its size.
    """
    wanted = parts.config.training.prompts_per_step
    rounds = parts.algorithm.max_sampling_rounds if parts.algorithm.dynamic_sampling else 1
    useful: list[RolloutGroup] = []
    flat: list[RolloutGroup] = []
    timeouts_before, unparsed_before = parts.task.timeouts, parts.task.unparsed_answers
    restarts, size = restarts_of(parts.config), parts.config.training.group_size
    for _ in range(rounds):
        prompts = parts.task.prompts(position, wanted, parts.config.seed)
        for group in sample_groups(parts, prompts, size, step, len(useful + flat), clock, restarts):
            (useful if len(set(group.rewards)) > 1 or not parts.algorithm.dynamic_sampling else flat).append(group)
        position += wanted
        if len(useful) >= wanted:
            break
    groups = (useful + flat)[:wanted]
    return Collected(
        groups=tuple(groups),
        position=position,
        dropped=len(useful) + len(flat) - len(groups),
        timeouts=parts.task.timeouts - timeouts_before,
        unparsed_answers=parts.task.unparsed_answers - unparsed_before,
        restarts=restarts.count,
    )


def sample_groups(
    parts: Parts,
    prompts: Sequence[Prompt],
    group_size: int,
    step: int,
    first_index: int,
    clock: Stopwatch,
    restarts: Restarts | None = None,
) -> list[RolloutGroup]:
    """Completions and rewards for some prompts; (seed, step, index) determines every draw.

    When the engine's process dies, a new one samples the same completions; `restarts` counts and limits that, by
    default for this call alone.

    Raises:
        EngineDiedError: it dies again and again.
        RewardError: a reward is not finite, or their number is wrong.
    """
    with clock("generate"):
        requests = [
            GenerateRequest(
                token_ids=prompt.token_ids,
                group_size=group_size,
                key=(parts.config.seed, step, first_index + index),
                prompt_id=prompt.prompt_id,
            )
            for index, prompt in enumerate(prompts)
        ]
        siblings = _generate(parts, requests, restarts or restarts_of(parts.config))
    with clock("reward"):
        return _scored(parts, prompts, siblings)


def _generate(parts: Parts, requests: list[GenerateRequest], restarts: Restarts) -> list[tuple[Completion, ...]]:
    return surviving(lambda: parts.engine.generate(requests, parts.config.sampling), lambda: revive(parts), restarts)


def _scored(parts: Parts, prompts: Sequence[Prompt], siblings: Sequence[tuple[Completion, ...]]) -> list[RolloutGroup]:
    flat = [(prompt, completion) for prompt, group in zip(prompts, siblings, strict=True) for completion in group]
    texts = completion_texts(parts.tokenizer, [completion for _, completion in flat])
    rewards = parts.task.rewards([prompt for prompt, _ in flat], texts, [c.finish_reason for _, c in flat])
    check_rewards(rewards, len(flat))
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
