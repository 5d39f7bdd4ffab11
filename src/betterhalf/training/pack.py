"""Lay rollouts end to end: from a step's rollouts and advantages to packs without padding.

The order is: a seeded shuffle of all rollouts, cut into one train batch for each optimizer step, each cut into
micro-batches by a token budget. Within a micro-batch sequences are sorted by length, so that equal ones share an
attention call.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from betterhalf.config.schema import RunConfig
from betterhalf.types import Denominators, MicroBatch, Rollout, StepBatch, TrainBatch


def pack_step(
    rollouts: Sequence[Rollout], advantages: Sequence[float], config: RunConfig, step: int, device: torch.device
) -> StepBatch:
    """All packs of one step.

    Args:
        rollouts: groups in order, siblings in order; [S].
        advantages: one for each rollout; those equal to 0 are measured but not trained on.
        config: sizes and seed.
        step: seeds the shuffle.
        device: where the tensors go.

    Returns:
        `config.training.optimizer_steps` train batches. Their denominators count zero-advantage rollouts too, so
        leaving those out of the backward pass changes nothing.
    """
    order = list(range(len(rollouts)))
    random.Random(f"pack-{config.seed}-{step}").shuffle(order)
    shares = _split_evenly(order, config.training.optimizer_steps)
    budget = config.training.tokens_per_micro_batch
    make = _Packer(rollouts, advantages, budget, device)
    train_batches = tuple(
        TrainBatch(
            micro_batches=make.micro_batches([i for i in share if advantages[i] != 0.0]),
            measure_only=make.micro_batches([i for i in share if advantages[i] == 0.0]),
            denominators=_denominators([rollouts[i] for i in share], config.sampling.max_tokens),
        )
        for share in shares
    )
    return StepBatch(train_batches=train_batches)


def pack_measured(rollouts: Sequence[Rollout], config: RunConfig, device: torch.device) -> tuple[MicroBatch, ...]:
    """Packs for scoring alone, laid out as those that train; all sequences are sorted by length first.

    Args:
        rollouts: [S]; `rollout_index_S` of the packs counts in this order.
        config: `training.tokens_per_micro_batch`.
        device: where the tensors go.
    """
    make = _Packer(rollouts, [0.0] * len(rollouts), config.training.tokens_per_micro_batch, device)
    return make.micro_batches(sorted(range(len(rollouts)), key=make.length))


def _split_evenly(items: list[int], parts: int) -> list[list[int]]:
    """Contiguous shares whose sizes differ by at most one."""
    edges = [round(k * len(items) / parts) for k in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(edges)]


def _denominators(rollouts: Sequence[Rollout], max_tokens: int) -> Denominators:
    tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    return Denominators(sequences=len(rollouts), tokens=tokens, max_tokens=max_tokens)


class _Packer:
    """Builds micro-batches from rollout indices."""

    def __init__(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], budget: int, device: torch.device
    ) -> None:
        self.rollouts = rollouts
        self.advantages = advantages
        self.budget = budget
        self.device = device

    def length(self, index: int) -> int:
        rollout = self.rollouts[index]
        return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)

    def micro_batches(self, indices: Sequence[int]) -> tuple[MicroBatch, ...]:
        """Fill packs in the given order up to the budget; a longer sequence gets a pack of its own."""
        packs: list[list[int]] = []
        room = 0
        for index in indices:
            length = self.length(index)
            if not packs or length > room:
                packs.append([])
                room = self.budget
            packs[-1].append(index)
            room -= length
        return tuple(self.micro_batch(sorted(pack, key=self.length)) for pack in packs)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """One pack of whole sequences."""
        chosen = [self.rollouts[i] for i in indices]
        lengths = [self.length(i) for i in indices]
        starts = [0, *accumulate(lengths)]
        rows: list[int] = []
        owner: list[int] = []
        for k, rollout in enumerate(chosen):
            first = starts[k] + len(rollout.prompt.token_ids) - 1
            rows.extend(range(first, first + len(rollout.completion.token_ids)))
            owner.extend([k] * len(rollout.completion.token_ids))
        return MicroBatch(
            token_ids_T=self._ints([t for r in chosen for t in (*r.prompt.token_ids, *r.completion.token_ids)]),
            position_ids_T=self._ints([p for length in lengths for p in range(length)]),
            sequence_lengths=tuple(lengths),
            loss_rows_C=self._ints(rows),
            target_ids_C=self._ints([t for r in chosen for t in r.completion.token_ids]),
            sequence_index_C=self._ints(owner),
            behavior_logprobs_C=self._floats([x for r in chosen for x in r.completion.behavior_logprobs]),
            advantages_S=self._floats([self.advantages[i] for i in indices]),
            rollout_index_S=tuple(indices),
        )

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _floats(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def by_rollout(pack: MicroBatch, values_C: torch.Tensor) -> dict[int, list[float]]:
    """Values of each completion token by rollout index, in token order."""
    counts = torch.bincount(pack.sequence_index_C, minlength=pack.num_sequences).tolist()
    parts = torch.split(values_C, counts)
    return {index: part.tolist() for index, part in zip(pack.rollout_index_S, parts, strict=True)}
