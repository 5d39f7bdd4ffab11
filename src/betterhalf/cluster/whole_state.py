"""Conversion between the states of a trainer's ranks and one whole state, for models that fit into one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.training.trainer import TrainerState


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """State of one rank."""

    state: TrainerState
    """Its tensors hold the rows of this rank."""
    ranges: Mapping[str, ShardRange]
    """Parameter name -> rows; empty for a rank that holds everything."""


def whole_state(ranks: Sequence[RankState]) -> TrainerState:
    """Return the whole state, in which the rows of all ranks are concatenated.

    Args:
        ranks: states in rank order; each holds the rows after those of the rank before it.
    """
    first = ranks[0]
    if not first.ranges:
        return first.state
    return replace(
        first.state,
        model=_joined([rank.state.model for rank in ranks], first.ranges),
        optimizer=_joined([rank.state.optimizer for rank in ranks], first.ranges),
        reference=_joined([rank.state.reference for rank in ranks], first.ranges),
    )


def rows_of(state: TrainerState, ranges: Mapping[str, ShardRange]) -> TrainerState:
    """Return one rank's rows of a whole state; all rows if `ranges` is empty."""
    return replace(
        state,
        model=_cut(state.model, ranges),
        optimizer=_cut(state.optimizer, ranges),
        reference=_cut(state.reference, ranges),
    )


def _joined(shards: Sequence[Mapping[str, Tensor]], ranges: Mapping[str, ShardRange]) -> dict[str, Tensor]:
    return {
        key: torch.cat([shard[key] for shard in shards]) if _range(key, tensor, ranges) else tensor
        for key, tensor in shards[0].items()
    }


def _cut(tensors: Mapping[str, Tensor], ranges: Mapping[str, ShardRange]) -> dict[str, Tensor]:
    return {
        key: tensor[rows.first : rows.first + rows.count] if (rows := _range(key, tensor, ranges)) else tensor
        for key, tensor in tensors.items()
    }


def _range(key: str, tensor: Tensor, ranges: Mapping[str, ShardRange]) -> ShardRange | None:
    """Return the rows of a parameter or of its optimizer state `<state>/<name>`; None if the tensor is not sharded."""
    return ranges.get(key.rpartition("/")[2]) if tensor.dim() else None
