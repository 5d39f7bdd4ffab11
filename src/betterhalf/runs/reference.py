"""The reference policy in a step: its logprobs before any update, and the KL penalty that lowers rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from betterhalf.algorithms.advantage import rollout_advantages
from betterhalf.algorithms.regularisation import reference_kl, sequence_penalties
from betterhalf.batches import MicroBatch, StepBatch
from betterhalf.runs.assembly import Parts
from betterhalf.runs.collect import Collected
from betterhalf.runs.measure import Measured, anchored, measure_also
from betterhalf.training.pack import with_advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Referenced:
    """A step's batch, ready for a loss with a KL penalty."""

    batch: StepBatch
    """With reference and proximal logprobs in the packs of the step's own rollouts, and with the final advantages."""
    measured: Measured
    """Scores of all these packs, and of those of the mismatch."""
    advantages: list[float]
    """One for each of the step's own rollouts, after the penalty."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`policy/reference_kl/*`, and the penalty on the reward; empty without a KL penalty."""


def with_reference(
    parts: Parts, collected: Collected, batch: StepBatch, measured: Measured, advantages: list[float]
) -> Referenced:
    """Score the step's own packs with the reference policy, and lower the rewards if the penalty belongs there.

    Without a KL penalty everything is returned as it is.

    Args:
        parts: trainer and algorithm.
        collected: the step's rollouts.
        batch: their packs, packed with `train_all`, so that they do not depend on the advantages.
        measured: scores at the current weights of some of the packs.
        advantages: from the rewards alone.
    """
    if not parts.algorithm.reads_reference:
        return Referenced(batch=batch, measured=measured, advantages=advantages)
    own = [index for train_batch in batch.train_batches for index in train_batch.packs]
    measured = measure_also(parts.trainer, batch, measured, own)
    batch = _scored(parts, anchored(batch, measured), own)
    metrics = reference_metrics(batch.chosen(own))
    if parts.algorithm.kl.place == "reward":
        penalties = _penalties(parts, batch.chosen(own))
        advantages = rollout_advantages(
            collected.groups, parts.algorithm, parts.config.sampling.max_tokens, kl_penalties=penalties
        )
        batch = with_advantages(batch, advantages)
        metrics |= {"rollout/kl_penalty/mean": sum(penalties) / len(penalties)}
    return Referenced(batch=batch, measured=measured, advantages=advantages, metrics=metrics)


def _scored(parts: Parts, batch: StepBatch, own: Sequence[int]) -> StepBatch:
    """Return the batch with reference logprobs in its own packs."""
    packs = list(batch.packs)
    for index, scores in zip(own, parts.trainer.measure_reference(batch.chosen(own)), strict=True):
        packs[index] = replace(packs[index], reference_logprobs_C=scores.logprobs_C)
    return replace(batch, packs=tuple(packs))


def _penalties(parts: Parts, packs: Sequence[MicroBatch]) -> list[float]:
    """Return the penalty on the reward of each of the step's own rollouts, in their order."""
    by_index: dict[int, float] = {}
    for pack in packs:
        values = sequence_penalties(parts.algorithm, pack).tolist()
        by_index.update(zip(pack.rollout_index_S, values, strict=True))
    return [by_index[index] for index in range(len(by_index))]


def reference_metrics(packs: Sequence[MicroBatch]) -> dict[str, float]:
    """Return `policy/reference_kl/*`: the estimate k3 over the tokens of packs with proximal and reference logprobs."""
    estimates = []
    for pack in packs:
        assert pack.proximal_logprobs_C is not None and pack.reference_logprobs_C is not None
        estimates.append(reference_kl("k3", pack.proximal_logprobs_C, pack.reference_logprobs_C)[0])
    estimate_C = torch.cat(estimates)
    return {"policy/reference_kl/mean": float(estimate_C.mean()), "policy/reference_kl/max": float(estimate_C.max())}


def refresh_reference(parts: Parts, step: int) -> None:
    """Make the policy after this step the reference, every `algorithm.kl.refresh_every` steps."""
    every = parts.algorithm.kl.refresh_every
    if every and step % every == 0:
        parts.trainer.refresh_reference()
