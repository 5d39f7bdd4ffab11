"""The loop: one step of reinforcement learning after another.

prompts -> completions -> rewards -> advantages -> packs -> mismatch and watchdog, before any update -> gradients ->
optimizer steps -> weight sync -> metrics
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from betterhalf.algorithms.advantage import equal_rewards, group_advantages, overlong_penalty
from betterhalf.algorithms.loss_stats import LossStats, policy_metrics
from betterhalf.algorithms.policy_loss import batch_denominators, kept_counts, kept_mask
from betterhalf.diagnostics.budget import budget_metrics, fit_budget
from betterhalf.diagnostics.logprob_gap import GapProfile, gap_profile, mismatch_metrics
from betterhalf.process import frozen_gc
from betterhalf.runs import watchdog
from betterhalf.runs.assembly import Parts
from betterhalf.runs.collect import Collected, collect_groups
from betterhalf.runs.rollout_metrics import rollout_metrics
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.system import peak_memory_gib
from betterhalf.runs.truncation import truncation_note
from betterhalf.runs.watchdog import Alarm, WatchState
from betterhalf.runs.weight_sync import sync_weights
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.training.policy_trainer import OptimReport
from betterhalf.training.schedule import learning_rate
from betterhalf.types import Denominators, MicroBatch, Rollout, StepBatch, TrainBatch

_PHASES = ("generate", "reward", "measure", "train", "sync")

Metrics = dict[str, float | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands; all that the next step depends on besides the trainer's state."""

    step: int = 0
    """Last finished step."""
    position: int = 0
    """Prompts consumed."""
    watch: WatchState = field(default_factory=WatchState)
    """What the watchdog has counted and done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRollout:
    """A rollout kept for people to read, with its per-token columns."""

    rollout: Rollout
    advantage: float
    trainer_logprobs: list[float] | None
    """log pi of each token at the weights that sampled it; None when the rollout was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step leaves behind."""

    progress: Progress
    metrics: Metrics
    profile: GapProfile
    """The mismatch by probability, position and completion."""
    alarms: tuple[Alarm, ...]
    """What the watchdog found before the update."""
    truncation: str | None
    """Why the rewards mean little: that nothing ended a completion of the first step; None if something did."""
    kept: tuple[KeptRollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Trainer logprobs and entropies at the weights that sampled, by pack."""

    logprobs: dict[int, Tensor]
    """id of the pack -> float32 [C], for all packs chosen for the mismatch or needed as anchor."""
    entropies: dict[int, Tensor]
    """id of the pack -> float32 [C]."""
    packs: tuple[MicroBatch, ...]
    """The packs the mismatch is taken over: all, or a seeded sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far trainer and engine are apart, before any update."""

    metrics: Metrics
    """`mismatch/*`, `budget/*` and the entropy, over all measured tokens."""
    profile: GapProfile


def train_steps(parts: Parts, progress: Progress, on_step: Callable[[StepResult], None]) -> Progress:
    """Run the steps after `progress` up to `training.steps`, telling `on_step` of each when it is complete."""
    with frozen_gc():
        while progress.step < parts.config.training.steps:
            result = train_step(parts, progress)
            progress = result.progress
            on_step(result)
    return progress


def train_step(parts: Parts, progress: Progress) -> StepResult:
    """One rollout batch and its optimizer steps."""
    step, clock = progress.step + 1, Stopwatch()
    collected = collect_groups(parts, step, progress.position, clock)
    parts.engine.sleep()
    advantages = step_advantages(parts, collected)
    batch = pack_step(
        collected.rollouts, advantages, parts.config, step, parts.precision.device, left_out=collected.left_out_rollouts
    )
    with clock("measure"):
        measured = measure(parts, batch, step)
        gap = mismatch(measured, parts.config.sampling.max_tokens)
    before: Metrics = {**rollout_metrics(collected, advantages), **gap.metrics}
    watch = watchdog.check(parts.config.watchdog.levels, progress.watch, step, before)
    parts = apply_watch(parts, watch.state)
    with clock("measure"):
        measured = with_anchors(parts, batch, measured)
    version = parts.trainer.policy_version
    rate = watch.state.learning_rate_factor * learning_rate(parts.config.optimizer, step, parts.config.training.steps)
    with clock("train"):
        learned = [learn(parts, train_batch, measured, rate) for train_batch in batch.train_batches]
    if parts.trainer.policy_version > version:
        with clock("sync"):
            sync_weights(parts)
    seconds = clock.total()
    metrics: Metrics = {
        **before,
        **learning_metrics(parts, learned, rate),
        **clock.metrics(_PHASES),
        "system/tokens_per_second": collected.tokens / seconds,
        "system/kept_tokens_per_second": collected.kept_tokens / seconds,
        "system/peak_memory_gib": peak_memory_gib(parts.precision.device),
    }
    return StepResult(
        progress=Progress(step=step, position=collected.position, watch=watch.state),
        metrics=metrics,
        profile=gap.profile,
        alarms=watch.alarms,
        truncation=truncation_note(parts, collected.rollouts + collected.left_out_rollouts) if step == 1 else None,
        kept=keep_rollouts(parts, collected.rollouts, advantages, measured, step),
    )


def step_advantages(parts: Parts, collected: Collected) -> list[float]:
    """One advantage for each rollout: reward, with the preset's overlong penalty, minus the baseline.

    Groups of equal rewards that fill a step of dynamic sampling get 0: the penalty alone would train them on length.
    """
    algorithm, max_tokens = parts.algorithm, parts.config.sampling.max_tokens
    rewards_PG = torch.tensor([group.rewards for group in collected.groups], dtype=torch.float64)
    lengths_PG = torch.tensor([[len(r.completion.token_ids) for r in g.rollouts] for g in collected.groups])
    penalty_PG = overlong_penalty(
        lengths_PG, max_tokens, algorithm.overlong_tokens(max_tokens), algorithm.overlong_factor
    )
    advantages_PG = group_advantages(rewards_PG + penalty_PG, algorithm.advantage)
    if algorithm.dynamic_sampling:
        advantages_PG = advantages_PG.masked_fill(equal_rewards(rewards_PG).unsqueeze(1), 0.0)
    advantages: list[float] = advantages_PG.flatten().tolist()
    return advantages


def measure(parts: Parts, batch: StepBatch, step: int) -> Measured:
    """Trainer logprobs at the weights that sampled the step, in the very packs that will train.

    In half precision another packing would round differently, and the first importance ratio would not be 1. The
    mismatch is taken over a seeded sample of packs (all of them by default).
    """
    count = max(1, round(parts.config.mismatch.sample_fraction * len(batch.packs)))
    chosen = random.Random(f"measure-{parts.config.seed}-{step}").sample(range(len(batch.packs)), count)
    nothing = Measured(logprobs={}, entropies={}, packs=tuple(batch.packs[i] for i in sorted(chosen)))
    return _scored(parts, nothing, nothing.packs)


def with_anchors(parts: Parts, batch: StepBatch, measured: Measured) -> Measured:
    """`measured` with what the algorithm reads of the proximal policy besides.

    That stays out of the mismatch: trained packs alone would bias it.
    """
    return _scored(parts, measured, _packs_with_proximal(parts, batch))


def _scored(parts: Parts, measured: Measured, packs: tuple[MicroBatch, ...]) -> Measured:
    """`measured` with the trainer's scores of `packs`, each scored once."""
    missing = [pack for pack in packs if id(pack) not in measured.logprobs]
    scores = {id(pack): parts.trainer.measure(pack) for pack in missing}
    return replace(
        measured,
        logprobs=measured.logprobs | {key: logprobs for key, (logprobs, _) in scores.items()},
        entropies=measured.entropies | {key: entropy for key, (_, entropy) in scores.items()},
    )


def apply_watch(parts: Parts, state: WatchState) -> Parts:
    """The parts as the watchdog wants them: with its mask, once that is on."""
    if not state.masked:
        return parts
    # The loss is computed by the trainer, the denominators by the loop: both read the algorithm.
    parts.trainer.algorithm = watchdog.masked(parts.algorithm)
    return replace(parts, algorithm=parts.trainer.algorithm)


def _packs_with_proximal(parts: Parts, batch: StepBatch) -> tuple[MicroBatch, ...]:
    """Packs whose proximal logprobs the loss (or, with `kept`, its denominator) reads."""
    if parts.algorithm.denominator == "kept":
        return tuple(pack for train_batch in batch.train_batches for pack in train_batch.packs)
    if not parts.algorithm.needs_proximal:
        return ()
    return tuple(pack for train_batch in batch.train_batches for pack in train_batch.micro_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What one optimizer step did."""

    stats: LossStats
    """Loss and counts, summed over the micro-batches."""
    report: OptimReport


def learn(parts: Parts, batch: TrainBatch, measured: Measured, rate: float) -> Learned:
    """Gradients of one train batch, then its optimizer step."""
    denominators = step_denominators(parts, batch, measured)
    stats = LossStats.empty()
    for pack in batch.micro_batches:
        proximal = measured.logprobs.get(id(pack))
        stats += parts.trainer.forward_backward(pack, proximal, denominators).stats
    report = parts.trainer.optim_step(rate)
    return Learned(stats=stats, report=report)


def step_denominators(parts: Parts, batch: TrainBatch, measured: Measured) -> Denominators:
    """The fixed denominators of a train batch; with `kept`, less what masks reject before any update."""
    if parts.algorithm.denominator == "all":
        return batch.denominators
    sequences, tokens = 0, 0
    for pack in batch.packs:
        kept = kept_mask(
            parts.algorithm,
            proximal_logprobs_C=measured.logprobs[id(pack)],
            behavior_logprobs_C=pack.behavior_logprobs_C,
            advantages_S=pack.advantages_S,
            sequence_index_C=pack.sequence_index_C,
            num_sequences=pack.num_sequences,
        )
        kept_sequences, kept_tokens = kept_counts(kept, pack.sequence_index_C, pack.num_sequences)
        sequences, tokens = sequences + int(kept_sequences), tokens + int(kept_tokens)
    return batch_denominators(
        parts.algorithm,
        sequences=int(batch.denominators.sequences),
        tokens=int(batch.denominators.tokens),
        kept_sequences=sequences,
        kept_tokens=tokens,
        max_tokens=batch.denominators.max_tokens,
    )


def mismatch(measured: Measured, max_tokens: int) -> Gap:
    """How far trainer and engine are apart, over all measured tokens, before any update."""
    offsets, offset = [], 0
    for pack in measured.packs:
        offsets.append(pack.sequence_index_C + offset)
        offset += pack.num_sequences
    trainer_C = torch.cat([measured.logprobs[id(pack)] for pack in measured.packs])
    behavior_C = torch.cat([pack.behavior_logprobs_C for pack in measured.packs])
    index_C = torch.cat(offsets)
    entropy = torch.cat([measured.entropies[id(pack)] for pack in measured.packs]).double().mean()
    metrics = mismatch_metrics(trainer_C, behavior_C, index_C, offset)
    budget = fit_budget(trainer_C.double() - behavior_C.double(), index_C, offset)
    return Gap(
        metrics={**metrics, **budget_metrics(budget), "policy/entropy/mean": float(entropy)},
        profile=gap_profile(trainer_C, behavior_C, index_C, offset, max_tokens),
    )


def learning_metrics(parts: Parts, learned: list[Learned], rate: float) -> Metrics:
    """`optim/*` and `policy/*` over the optimizer steps of one step."""
    reports = [part.report for part in learned]
    applied = [report for report in reports if not report.skipped]
    offenders = [report.first_offender for report in reports if report.first_offender]
    stats = sum((part.stats for part in learned), LossStats.empty())
    return {
        "optim/loss_scale": parts.trainer.scaler.scale,
        "optim/skipped": float(len(reports) - len(applied)),
        "optim/updates_applied": float(len(applied)),
        "optim/first_offender": offenders[0] if offenders else None,
        "optim/grad_norm": statistics.fmean(r.grad_norm for r in applied) if applied else None,
        "optim/learning_rate": rate,
        "optim/subnormal_fraction": statistics.fmean(report.subnormal_fraction for report in reports),
        "optim/zero_fraction": statistics.fmean(report.zero_fraction for report in reports),
        "optim/overflow_fraction": max(report.overflow_fraction for report in reports),
        "policy/version": float(parts.trainer.policy_version),
        **policy_metrics(stats, len(learned)),
    }


def keep_rollouts(
    parts: Parts, rollouts: list[Rollout], advantages: list[float], measured: Measured, step: int
) -> tuple[KeptRollout, ...]:
    """A seeded choice of rollouts with their per-token columns."""
    count = min(parts.config.logging.rollouts_per_step, len(rollouts))
    chosen = sorted(random.Random(f"keep-{parts.config.seed}-{step}").sample(range(len(rollouts)), count))
    scores: dict[int, list[float]] = {}
    for pack in measured.packs:
        if set(pack.rollout_index_S) & set(chosen):
            scores.update(by_rollout(pack, measured.logprobs[id(pack)]))
    return tuple(
        KeptRollout(rollout=rollouts[i], advantage=advantages[i], trainer_logprobs=scores.get(i)) for i in chosen
    )
