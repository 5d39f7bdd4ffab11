"""Aggregation: the reduction of the token losses of a micro-batch to its share of the train batch's loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.batches import Denominators, TokenTensors
from betterhalf.types import AggregationKind


def aggregate(kind: AggregationKind, loss_C: Tensor, tokens: TokenTensors, denominators: Denominators) -> Tensor:
    """Return the loss of a micro-batch, a scalar: its additive share of the loss of the train batch.

    Args:
        kind: the reduction; docs/algorithms.md has the formulas.
        loss_C: [C] loss of each token.
        tokens: gives the sequence of each token.
        denominators: those of the whole train batch.
    """
    counted_C = torch.ones_like(loss_C, dtype=torch.bool)
    share_C = token_shares(kind, counted_C, tokens.sequence_index_C, tokens.num_sequences, denominators)
    return (loss_C * share_C.to(loss_C.dtype)).sum()


def token_shares(
    kind: AggregationKind, counted_C: Tensor, sequence_index_C: Tensor, num_sequences: int, denominators: Denominators
) -> Tensor:
    """Return the factor of each token's loss in the loss of the train batch, float64 [C].

    Args:
        kind: the reduction.
        counted_C: bool [C], tokens in the denominator of their sequence's mean.
        sequence_index_C: int64 [C].
        num_sequences: S.
        denominators: those of the whole train batch.
    """
    return _SHARES[kind](counted_C, sequence_index_C, num_sequences, denominators)


def _constant_length(
    counted_C: Tensor, sequence_index_C: Tensor, num_sequences: int, denominators: Denominators
) -> Tensor:
    return torch.full_like(counted_C, 1 / (denominators.max_tokens * denominators.sequences), dtype=torch.float64)


def _sequence_mean(
    counted_C: Tensor, sequence_index_C: Tensor, num_sequences: int, denominators: Denominators
) -> Tensor:
    counts_S = ops.segment_sum(counted_C.double(), sequence_index_C, num_sequences).clamp(min=1)
    return (1 / (counts_S * denominators.sequences))[sequence_index_C]


def _token_mean(counted_C: Tensor, sequence_index_C: Tensor, num_sequences: int, denominators: Denominators) -> Tensor:
    return torch.full_like(counted_C, 1 / denominators.tokens, dtype=torch.float64)


_SHARES: dict[AggregationKind, Callable[[Tensor, Tensor, int, Denominators], Tensor]] = {
    "constant_length": _constant_length,
    "sequence_mean": _sequence_mean,
    "token_mean": _token_mean,
}
