"""The training loop: one step of reinforcement learning, repeated.

prompts -> completions -> rewards -> advantages -> packs -> mismatch, reference and watchdog, before any update ->
gradients -> optimizer steps -> weight sync -> metrics
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from betterhalf.algorithms.advantage import rollout_advantages
from betterhalf.diagnostics.logprob_gap import GapProfile
from betterhalf.process import frozen_gc
from betterhalf.runs import watchdog
from betterhalf.runs.assembly import Parts
from betterhalf.runs.collect import collect_groups
from betterhalf.runs.epochs import epochs
from betterhalf.runs.kept_rollouts import KeptRollout, keep_rollouts
from betterhalf.runs.learn import learn_all
from betterhalf.runs.measure import anchor_packs, anchored, measure, measure_also, mismatch
from betterhalf.runs.pipeline import InStep, Sampler, sampling
from betterhalf.runs.progress import Progress
from betterhalf.runs.reference import refresh_reference, with_reference
from betterhalf.runs.step_metrics import learning_metrics, rollout_metrics, system_metrics
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.truncation import truncation_note
from betterhalf.runs.watchdog import Alarm
from betterhalf.runs.weight_sync import merge_metrics, sync_weights
from betterhalf.training.pack import pack_step
from betterhalf.training.schedule import learning_rate

_PHASES = ("generate", "reward", "measure", "train", "sync")

Metrics = dict[str, float | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of one step."""

    progress: Progress
    """Position of the run after the step."""
    metrics: Metrics
    """Row of `metrics.jsonl`."""
    profile: GapProfile
    """The mismatch by probability, position and completion."""
    alarms: tuple[Alarm, ...]
    """Alarms of the watchdog, from before the update and after it."""
    truncation: str | None
    """Note that every completion of the first step was cut off, so that rewards mean little; None otherwise."""
    kept: tuple[KeptRollout, ...]
    """Rollouts for `rollouts.jsonl`."""


def train_steps(parts: Parts, progress: Progress, on_step: Callable[[StepResult], None]) -> Progress:
    """Run the steps after `progress` up to `training.steps`, and call `on_step` after each."""
    with frozen_gc(), sampling(parts, collect_groups) as sampler:
        while progress.step < parts.config.training.steps:
            result = train_step(parts, progress, sampler)
            progress = result.progress
            on_step(result)
    return progress


def train_step(parts: Parts, progress: Progress, sampler: Sampler | None = None) -> StepResult:
    """Sample one rollout batch, measure it, and train on it in `training.optimizer_steps` optimizer steps an epoch."""
    config, trainer, step = parts.config, parts.trainer, progress.step + 1
    max_tokens, clock = config.sampling.max_tokens, Stopwatch(parts.precision.device)

    sampler = sampler or InStep(parts, collect_groups)
    collected = sampler.collect(progress, clock)

    advantages = rollout_advantages(collected.groups, parts.algorithm, max_tokens)
    left_out, train_all = collected.left_out_rollouts, parts.algorithm.trains_every_group
    batch = pack_step(collected.rollouts, advantages, config, step, left_out=left_out, train_all=train_all)

    # Before any update: the mismatch, the reference, the watchdog, and the proximal anchor from the same logprobs.
    with clock("measure"):
        measured = measure(trainer, batch, config, step, progress.policy_version - collected.policy_version)
        gap = mismatch(batch, measured, max_tokens)
        compared = with_reference(parts, collected, batch, measured, advantages)
    advantages, batch = compared.advantages, compared.batch
    described = rollout_metrics(collected, advantages, batch.masked_sequences)
    before: Metrics = {**described, **gap.metrics, **merge_metrics(parts), **compared.metrics}
    watch = watchdog.check(config.watchdog.levels, progress.watch, step, before)
    algorithm = watchdog.masked(parts.algorithm) if watch.state.masked else parts.algorithm
    with clock("measure"):
        measured = measure_also(trainer, batch, compared.measured, anchor_packs(algorithm, batch))
        batch = anchored(batch, measured)

    rate = watch.state.learning_rate_factor * learning_rate(config.optimizer, step, config.training.steps)
    with clock("train"):
        sampler.before_update()
        passes = epochs(batch, collected.rollouts, advantages, config, step, train_all=train_all)
        learned = learn_all(trainer, algorithm, passes, rate)
        refresh_reference(parts, step)

    metrics: Metrics = {**before, **learning_metrics(learned, rate)}
    after = watchdog.check(config.watchdog.levels, watch.state, step, metrics, watchdog.AFTER)
    policy_version = learned[-1].report.policy_version
    sampler.settle()
    if policy_version > progress.policy_version:
        with clock("sync"):
            sync_weights(parts)

    sampled = collected.rollouts + left_out
    return StepResult(
        progress=replace(
            progress, step=step, position=collected.position, policy_version=policy_version, watch=after.state
        ),
        metrics={
            **metrics,
            **clock.metrics(_PHASES),
            **system_metrics(collected, clock.total(), parts.precision.device),
        },
        profile=gap.profile,
        alarms=watch.alarms + after.alarms,
        truncation=truncation_note(sampled, max_tokens, parts.model.turn_end) if step == 1 else None,
        kept=keep_rollouts(collected.rollouts, advantages, batch, measured, config, step),
    )
