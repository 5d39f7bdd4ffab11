"""Sample completions of prompts from the engine and grade them, and describe the results with confidence intervals."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from betterhalf.config.schema import EvaluateConfig
from betterhalf.diagnostics.accuracy import majority_at, pass_at
from betterhalf.diagnostics.deployment_gap import DeploymentGap, deployment_gap
from betterhalf.diagnostics.estimates import Estimate, mean_estimates
from betterhalf.rollout.engine import take_restarts
from betterhalf.runs.assembly import Parts
from betterhalf.runs.collect import sample_groups
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.setup.evaluation import EvaluationSet
from betterhalf.tasks.answers import Extract
from betterhalf.training.pack import by_rollout, pack_measured
from betterhalf.types import Prompt, RolloutGroup

EVALUATION_STEP = 2**31 - 1
"""Step in the random key: no training step reaches it, so evaluation never repeats a draw of training."""

_FIRST_NAMED_STEP = 2**30
"""Steps from here on are those of the data sets in `[evaluate.data]`, which their names choose."""

PROMPTS_AT_ONCE = 64
"""Number of prompts in a block, whose results are kept as soon as they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """Results of the completions of one prompt."""

    data: str = ""
    """Name of the data set."""
    prompt_id: str
    solved: int
    """Number of completions with a reward of at least 1."""
    samples: int
    """Number of completions."""
    reward: float
    """Mean reward."""
    truncated: int
    """Number of completions that reached the length limit."""
    tokens: int
    """Number of completion tokens, over all samples."""
    rewards: tuple[float, ...] = ()
    """Reward of each completion."""
    answers: tuple[str | None, ...] | None = None
    """Answer of each completion, None for one without; None for a task that extracts no answers."""
    log_ratios: tuple[float, ...] | None = None
    """log pi - log mu of each completion, for the deployment gap; None if the trainer did not score them."""

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Return a row of `evaluation.jsonl`; earlier versions wrote fewer fields."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in row.items() if key in known
        }
        return cls(**values)


def evaluate_prompts(
    parts: Parts,
    prompts: Sequence[Prompt],
    samples: int,
    *,
    policy_version: int,
    step: int = EVALUATION_STEP,
    first_index: int = 0,
    extract: Extract | None = None,
    score: bool = False,
    keep: Callable[[Sequence[PromptResult]], None] = lambda results: None,
) -> list[PromptResult]:
    """Sample `samples` completions of each prompt from the engine and count what is solved.

    Args:
        parts: engine, task and settings.
        prompts: prompts to evaluate.
        samples: number of completions of each.
        policy_version: version of the engine's weights.
        step: step in the random key.
        first_index: index of the first prompt in the random key.
        extract: function that extracts the answer of a completion; None for no answers.
        score: also score the completions with the trainer.
        keep: called with the results of each block of prompts as soon as they are known.

    Raises:
        EngineError, RewardError: see `sample_groups`.
    """
    results: list[PromptResult] = []
    clock = Stopwatch(parts.precision.device)
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        block = prompts[start : start + PROMPTS_AT_ONCE]
        groups = sample_groups(
            parts,
            block,
            samples,
            step=step,
            policy_version=policy_version,
            first_index=first_index + start,
            clock=clock,
        )
        take_restarts(parts.engine)  # each block may restart engines as often as a step
        found = [_result(group, extract) for group in groups]
        if score:
            ratios = _log_ratios(parts, groups)
            found = [replace(result, log_ratios=row) for result, row in zip(found, ratios, strict=True)]
        keep(found)
        results += found
    return results


def evaluate_set(
    parts: Parts,
    data: EvaluationSet,
    indices: range,
    *,
    policy_version: int,
    score: bool = False,
    keep: Callable[[Sequence[PromptResult]], None] = lambda results: None,
) -> list[PromptResult]:
    """Evaluate the prompts of a data set at some indices, with the sampling of `[evaluate]`; see `evaluate_prompts`."""
    return [
        replace(result, data=data.name)
        for result in evaluate_prompts(
            replace(parts, task=data.task, config=data.config),
            [data.task.prompt(index) for index in indices],
            data.config.evaluate.samples,
            policy_version=policy_version,
            step=draw_step(data),
            first_index=indices.start,
            extract=data.extract,
            score=score,
            keep=lambda results: keep([replace(result, data=data.name) for result in results]),
        )
    ]


def draw_step(data: EvaluationSet) -> int:
    """Return the data set's step in the random key, chosen by its name: other data sets do not change its draws."""
    if data.key == "task":
        return EVALUATION_STEP
    return _FIRST_NAMED_STEP + zlib.crc32(data.name.encode()) % (_FIRST_NAMED_STEP - 2)


def _result(group: RolloutGroup, extract: Extract | None) -> PromptResult:
    completions = [rollout.completion for rollout in group.rollouts]
    return PromptResult(
        prompt_id=group.prompt.prompt_id,
        solved=sum(reward >= 1.0 for reward in group.rewards),
        samples=len(completions),
        reward=statistics.fmean(group.rewards),
        truncated=sum(completion.finish_reason == "length" for completion in completions),
        tokens=sum(len(completion.token_ids) for completion in completions),
        rewards=group.rewards,
        answers=None if extract is None else _answers(group, extract),
    )


def _answers(group: RolloutGroup, extract: Extract) -> tuple[str | None, ...]:
    """Return the answer of each completion; a completion that was cut off has none, as the graders see it."""
    return tuple(
        extract(rollout.text) if rollout.completion.finish_reason == "stop" else None for rollout in group.rollouts
    )


def _log_ratios(parts: Parts, groups: Sequence[RolloutGroup]) -> list[tuple[float, ...]]:
    """Return log pi - log mu of each whole completion, by the trainer's forward pass of training."""
    parts.engine.sleep()
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    packs = pack_measured(rollouts, parts.config)
    found: dict[int, float] = {}
    for pack, scores in zip(packs, parts.trainer.measure(packs), strict=True):
        differences_C = scores.logprobs_C.double() - pack.behavior_logprobs_C.double()
        found |= {index: float(sum(values)) for index, values in by_rollout(pack, differences_C).items()}
    ratios = iter([found[index] for index in range(len(rollouts))])
    return [tuple(next(ratios) for _ in group.rollouts) for group in groups]


def average_reward(results: Sequence[PromptResult]) -> float:
    """Return avg@k: the mean reward over all completions of all prompts."""
    return statistics.fmean(result.reward for result in results)


def estimates(results: Sequence[PromptResult], config: EvaluateConfig, seed: int) -> dict[str, Estimate]:
    """Return `avg@k`, and `pass@k` and `maj@k` for each k, with intervals over prompts.

    Args:
        results: results of the prompts of one data set; without answers there is no `maj@k`.
        config: number of samples, k and confidence.
        seed: seed of the resamples.
    """
    measures = {f"avg@{config.samples}": [result.reward for result in results]}
    for k in config.ks:
        measures[f"pass@{k}"] = [pass_at(result.solved, result.samples, k) for result in results]
    if all(result.answers is not None for result in results):
        for k in config.ks:
            measures[f"maj@{k}"] = [_majority(result, k) for result in results]
    return mean_estimates(measures, resamples=config.resamples, confidence=config.confidence, seed=seed)


def _majority(result: PromptResult, k: int) -> float:
    assert result.answers is not None
    return majority_at(result.answers, [reward >= 1.0 for reward in result.rewards], k)


def gap_of(results: Sequence[PromptResult], config: EvaluateConfig, seed: int) -> DeploymentGap | None:
    """Return the deployment gap; None if the completions were not scored by the trainer."""
    log_ratios = [result.log_ratios for result in results if result.log_ratios is not None]
    if len(log_ratios) < len(results):
        return None
    rewards = [result.rewards for result in results]
    return deployment_gap(rewards, log_ratios, resamples=config.resamples, confidence=config.confidence, seed=seed)


def summary_of(results: Sequence[PromptResult], config: EvaluateConfig, seed: int) -> dict[str, Any]:
    """Return the results of one data set as JSON values: estimates, their intervals, lengths."""
    found = estimates(results, config, seed)
    completions = sum(result.samples for result in results)
    summary: dict[str, Any] = {
        "prompts": len(results),
        "samples": config.samples,
        **{name: estimate.value for name, estimate in found.items()},
        "truncated_fraction": sum(result.truncated for result in results) / completions,
        "mean_length": sum(result.tokens for result in results) / completions,
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in found.items()},
    }
    gap = gap_of(results, config, seed)
    return summary | ({"deployment_gap": _gap_json(gap)} if gap else {})


def _gap_json(gap: DeploymentGap) -> dict[str, Any]:
    return {
        "accuracy": gap.accuracy,
        "trainer_accuracy": gap.trainer_accuracy,
        "gap": gap.gap.value,
        "interval": [gap.gap.low, gap.gap.high],
        "ess_fraction": gap.ess_fraction,
        "reliable": gap.reliable,
    }
