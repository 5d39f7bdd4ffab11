"""Several passes over one rollout batch, `training.epochs`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from betterhalf.batches import MicroBatch, StepBatch, TokenTensors
from betterhalf.config.schema import RunConfig
from betterhalf.training.pack import pack_step
from betterhalf.types import Rollout

_MEASURED = tuple(field.name for field in fields(TokenTensors) if field.default is None)
"""Tensors [C] that are measured before the first update, and absent if nothing reads them."""


def epochs(
    batch: StepBatch,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    config: RunConfig,
    step: int,
    *,
    train_all: bool = False,
) -> Iterator[StepBatch]:
    """Yield the batch of each pass over the rollouts: the given one, then the same rollouts in other orders.

    What was measured before the first update, such as the proximal logprobs, is not measured again: every pass has the
    values of the first.

    Args:
        batch: the first pass, with everything that the loss reads.
        rollouts: those that the step trains on.
        advantages: one for each rollout.
        config: sizes, seed and number of passes.
        step: seeds the orders.
        train_all: as in `pack_step`.
    """
    yield batch
    if config.training.epochs == 1:
        return
    known = {name: _by_rollout(batch.packs, name) for name in _MEASURED}
    for epoch in range(1, config.training.epochs):
        later = pack_step(rollouts, advantages, config, step, epoch=epoch, train_all=train_all)
        yield replace(later, packs=tuple(_with_known(pack, known) for pack in later.packs))


def _by_rollout(packs: Sequence[MicroBatch], name: str) -> dict[int, Tensor]:
    """Split a tensor [C] of all packs that have it by rollout."""
    found: dict[int, Tensor] = {}
    for pack in packs:
        values_C = getattr(pack, name)
        if values_C is not None:
            counts = torch.bincount(pack.sequence_index_C, minlength=pack.num_sequences).tolist()
            found |= zip(pack.rollout_index_S, torch.split(values_C, counts), strict=True)
    return found


def _with_known(pack: MicroBatch, known: dict[str, dict[int, Tensor]]) -> MicroBatch:
    """Add the tensors that all sequences of the pack have."""
    values: dict[str, Any] = {
        name: torch.cat([of_rollout[index] for index in pack.rollout_index_S])
        for name, of_rollout in known.items()
        if all(index in of_rollout for index in pack.rollout_index_S)
    }
    return replace(pack, **values)
