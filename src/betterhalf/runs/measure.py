"""Trainer logprobs of a step before any update: the mismatch to the engine, and the proximal anchor of the loss.

All are computed at the weights that sampled the step. Where the trainer has been updated since, with
`pipeline.max_staleness = 1`, it has kept those weights; its logprobs at the newest ones serve the staleness alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import MicroBatch, StepBatch
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics import experts
from betterhalf.diagnostics.budget import budget_metrics, fit_budget
from betterhalf.diagnostics.logprob_gap import GapProfile, gap_profile, mismatch_metrics
from betterhalf.diagnostics.staleness import staleness_metrics
from betterhalf.training.trainer import TokenScores, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Scores of a step's packs at the weights that sampled them."""

    scores: Mapping[int, TokenScores]
    """Index of a pack -> its scores, for the packs in `sample` and for others that the loss needs."""
    sample: tuple[int, ...]
    """Indices of the packs over which the mismatch is computed: all, or a seeded sample; ascending."""
    behind: int = 0
    """Number of applied updates between the weights that sampled and the trainer's newest."""
    newest: Mapping[int, TokenScores] = field(default_factory=dict)
    """Index of each pack in `sample` -> its scores at the newest weights; empty if the run never samples ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Mismatch between trainer and engine at the same weights."""

    metrics: dict[str, float]
    """`mismatch/*`, `budget/*` and the entropy over all measured tokens, `staleness/*` if the run samples ahead, and
    `experts/*` for a mixture of experts."""
    profile: GapProfile
    """The mismatch by probability, position and completion."""


def measure(trainer: Trainer, batch: StepBatch, config: RunConfig, step: int, behind: int = 0) -> Measured:
    """Score a seeded sample of the step's packs (all by default), as they are packed for training.

    In half precision another packing would round differently, and the first importance ratio would not be 1.

    Args:
        trainer: has kept the weights that sampled, if it has been updated since.
        batch: packs of the step.
        config: share of packs to score, seed, and whether the run samples ahead.
        step: seeds the draw.
        behind: number of applied updates between the weights that sampled and the trainer's newest.
    """
    count = max(1, round(config.mismatch.sample_fraction * len(batch.packs)))
    chosen = random.Random(f"measure-{config.seed}-{step}").sample(range(len(batch.packs)), count)
    measured = measure_also(trainer, batch, Measured(scores={}, sample=tuple(sorted(chosen)), behind=behind), chosen)
    if not config.pipeline.max_staleness:
        return measured
    newest = trainer.measure(batch.chosen(measured.sample)) if behind else measured.scores.values()
    return replace(measured, newest=dict(zip(measured.sample, newest, strict=True)))


def measure_also(trainer: Trainer, batch: StepBatch, measured: Measured, packs: Iterable[int]) -> Measured:
    """Score those `packs` that have no scores yet; they stay out of the mismatch, whose sample must be random."""
    missing = sorted(set(packs) - measured.scores.keys())
    score = trainer.measure_kept if measured.behind else trainer.measure
    found = score(batch.chosen(missing)) if missing else []
    return replace(measured, scores={**measured.scores, **dict(zip(missing, found, strict=True))})


def anchor_packs(algorithm: Algorithm, batch: StepBatch) -> list[int]:
    """Return the indices of the packs whose proximal logprobs the loss (or, with `kept`, its denominator) reads."""
    if algorithm.denominator == "kept":
        return [index for train_batch in batch.train_batches for index in train_batch.countable]
    if not algorithm.needs_proximal:
        return []
    return [index for train_batch in batch.train_batches for index in train_batch.micro_batches]


def anchored(batch: StepBatch, measured: Measured) -> StepBatch:
    """Return the batch with the measured logprobs as proximal logprobs, in every pack that was scored."""
    packs = [
        replace(pack, proximal_logprobs_C=measured.scores[index].logprobs_C) if index in measured.scores else pack
        for index, pack in enumerate(batch.packs)
    ]
    return replace(batch, packs=tuple(packs))


def mismatch(batch: StepBatch, measured: Measured, max_tokens: int) -> Gap:
    """Compare trainer and engine over all measured tokens, and the trainer with itself if the run samples ahead.

    Args:
        batch: packs of the step.
        measured: scores of the packs; those of `sample` are used.
        max_tokens: length limit of a completion, for the profile by position.

    Raises:
        EngineNumericsError, NumericsError: logprobs of the engine, or of the trainer, are not finite.
    """
    packs, offsets, sequences = batch.chosen(measured.sample), [], 0
    for pack in packs:
        offsets.append(pack.sequence_index_C + sequences)
        sequences += pack.num_sequences
    trainer_C = torch.cat([measured.scores[index].logprobs_C for index in measured.sample])
    entropies_C = torch.cat([measured.scores[index].entropies_C for index in measured.sample])
    behavior_C = torch.cat([pack.behavior_logprobs_C for pack in packs])
    index_C = torch.cat(offsets)
    metrics = mismatch_metrics(trainer_C, behavior_C, index_C, sequences)
    budget = fit_budget(trainer_C.double() - behavior_C.double(), index_C, sequences)
    entropy = float(entropies_C.double().mean())
    routed, layers = _routing(packs, [measured.scores[index] for index in measured.sample])
    stale: dict[str, float] = {}
    if measured.newest:
        newest_C = torch.cat([measured.newest[index].logprobs_C for index in measured.sample])
        stale = staleness_metrics(newest_C, trainer_C, index_C, sequences, measured.behind)
    return Gap(
        metrics={**metrics, **budget_metrics(budget), "policy/entropy/mean": entropy, **routed, **stale},
        profile=replace(gap_profile(trainer_C, behavior_C, index_C, sequences, max_tokens), by_expert_layer=layers),
    )


def _routing(
    packs: Sequence[MicroBatch], scores: Sequence[TokenScores]
) -> tuple[dict[str, float], tuple[experts.ExpertLayer, ...]]:
    """Return `experts/*`, and the same by layer: the load, and the changes if the engine reports its experts.

    Both are empty without experts.
    """
    pairs = [
        (score.experts_TLK, pack.experts_TLK)
        for pack, score in zip(packs, scores, strict=True)
        if score.experts_TLK is not None
    ]
    if not pairs:
        return {}, ()
    trainer_TLK = experts.joined([own for own, _ in pairs])
    counts_LE = experts.expert_counts(trainer_TLK, scores[0].num_experts)
    load = experts.load_metrics(counts_LE)
    engine = [given for _, given in pairs if given is not None]
    if len(engine) < len(pairs):
        return load, experts.expert_layers(counts_LE, None)
    changed_TL = experts.changed_tokens(trainer_TLK, experts.joined(engine))
    return {**experts.change_metrics(changed_TL), **load}, experts.expert_layers(counts_LE, changed_TL)
