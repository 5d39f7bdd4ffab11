"""Denominators of the loss, fixed for a train batch before its first micro-batch whatever masks reject later.

With `algorithm.denominator = "kept"`, tokens that masks reject before the first update leave the denominator too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.algorithms.policy_loss import kept_mask
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import Denominators, TokenTensors


def train_denominators(algorithm: Algorithm, packs: Iterable[TokenTensors], denominators: Denominators) -> Denominators:
    """Return the denominators of the loss of one train batch.

    Args:
        algorithm: its `denominator` is `all` or `kept`.
        packs: packs that may count, those without a gradient included (`TrainBatch.countable`); with `kept` they need
            proximal logprobs.
        denominators: counts of all sequences and tokens of the train batch.

    Returns:
        `denominators`, or with `kept` the counts that remain, each at least 1.

    Raises:
        ValueError: proximal logprobs are missing with `kept`.
    """
    if algorithm.denominator == "all":
        return denominators
    sequences, tokens = 0, 0
    for pack in packs:
        kept = kept_counts(kept_mask(algorithm, pack), pack.sequence_index_C, pack.num_sequences)
        sequences, tokens = sequences + int(kept[0]), tokens + int(kept[1])
    return replace(denominators, sequences=float(max(sequences, 1)), tokens=float(max(tokens, 1)))


def kept_counts(kept_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Count the sequences and tokens that stay in the denominator.

    A sequence leaves when all of its tokens are rejected; one without tokens has none to reject and stays.

    Args:
        kept_C: bool [C], the `kept_mask` of a micro-batch.
        sequence_index_C: int64 [C].
        num_sequences: S.

    Returns:
        (sequences, tokens), int64 scalars.
    """
    tokens_S = ops.segment_sum(torch.ones_like(kept_C, dtype=torch.int64), sequence_index_C, num_sequences)
    kept_S = ops.segment_sum(kept_C.long(), sequence_index_C, num_sequences)
    return ((kept_S > 0) | (tokens_S == 0)).sum(), kept_S.sum()
