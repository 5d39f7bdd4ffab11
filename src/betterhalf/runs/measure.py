"""Trainer logprobs of a step before any update: the mismatch to the engine, and the proximal anchor of the loss."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import StepBatch
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.budget import budget_metrics, fit_budget
from betterhalf.diagnostics.logprob_gap import GapProfile, gap_profile, mismatch_metrics
from betterhalf.training.trainer import TokenScores, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Scores of a step's packs at the weights that sampled them."""

    scores: Mapping[int, TokenScores]
    """Index of a pack -> its scores, for the packs in `sample` and for others that the loss needs."""
    sample: tuple[int, ...]
    """Indices of the packs over which the mismatch is computed: all, or a seeded sample; ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Mismatch between trainer and engine at the same weights."""

    metrics: dict[str, float]
    """`mismatch/*`, `budget/*` and the entropy, over all measured tokens."""
    profile: GapProfile
    """The mismatch by probability, position and completion."""


def measure(trainer: Trainer, batch: StepBatch, config: RunConfig, step: int) -> Measured:
    """Score a seeded sample of the step's packs (all by default), as they are packed for training.

    In half precision another packing would round differently, and the first importance ratio would not be 1.
    """
    count = max(1, round(config.mismatch.sample_fraction * len(batch.packs)))
    chosen = random.Random(f"measure-{config.seed}-{step}").sample(range(len(batch.packs)), count)
    return measure_also(trainer, batch, Measured(scores={}, sample=tuple(sorted(chosen))), chosen)


def measure_also(trainer: Trainer, batch: StepBatch, measured: Measured, packs: Iterable[int]) -> Measured:
    """Score those `packs` that have no scores yet; the mismatch ignores them, or trained packs would bias it."""
    missing = sorted(set(packs) - measured.scores.keys())
    found = trainer.measure(batch.chosen(missing)) if missing else []
    return replace(measured, scores={**measured.scores, **dict(zip(missing, found, strict=True))})


def anchor_packs(algorithm: Algorithm, batch: StepBatch) -> list[int]:
    """Return the packs whose proximal logprobs the loss (or, with `kept`, its denominator) reads."""
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
    """Compare trainer and engine over all measured tokens.

    Args:
        batch: packs of the step.
        measured: scores of the packs; those of `sample` are used.
        max_tokens: length limit of a completion, for the profile by position.
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
    return Gap(
        metrics={**metrics, **budget_metrics(budget), "policy/entropy/mean": entropy},
        profile=gap_profile(trainer_C, behavior_C, index_C, sequences, max_tokens),
    )
