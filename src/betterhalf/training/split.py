"""Assignment of packs to the ranks of a trainer, by tokens.

The pack stays the unit: it is measured and trained on as it was packed, whichever rank it goes to, so its logprobs do
not depend on the number of ranks. `pack_step` makes at least one pack for each rank in a train batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from betterhalf.batches import MicroBatch, PackedSegment


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Packs of each rank for one call of the trainer."""

    ranks: tuple[tuple[int, ...], ...]
    """For each rank, indices into the packs of the call, in the order in which the rank computes them."""
    passes: int
    """Number of passes of every rank: that of the rank with the most packs. A rank with fewer adds empty passes, or the
    collectives of the others would wait for it."""
    tokens: tuple[int, ...]
    """Packed tokens of each rank."""

    @property
    def balance(self) -> float:
        """Mean of the ranks' tokens divided by their maximum: 1 if all have the same, 0 without tokens."""
        largest = max(self.tokens)
        return sum(self.tokens) / (len(self.tokens) * largest) if largest else 0.0


def split_packs(packs: Sequence[MicroBatch], ranks: int) -> Split:
    """Give each pack, longest first, to the rank with the fewest tokens so far; ties go to the lowest rank.

    Each rank computes its longest pack first, so that ranks which wait for each other in every pass compute packs of
    similar length. A single rank keeps the order of the packs: sums then have the bits of a trainer in one process.

    Args:
        packs: packs of one call of `measure` or `forward_backward`; may be empty.
        ranks: number of ranks, at least 1.

    Returns:
        The same split for the same token counts, whatever the content of the packs.
    """
    return split_lengths([pack.num_tokens for pack in packs], ranks)


def split_lengths(lengths: Sequence[int], ranks: int) -> Split:
    """Return the split of packs of these token counts; see `split_packs`."""
    assert ranks >= 1, f"a trainer of {ranks} ranks"
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index]) if ranks > 1 else range(len(lengths))
    chosen: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in order:
        rank = tokens.index(min(tokens))
        chosen[rank].append(index)
        tokens[rank] += lengths[index]
    return Split(
        ranks=tuple(map(tuple, chosen)),
        passes=max(map(len, chosen)),
        tokens=tuple(tokens),
    )


def empty_pack() -> MicroBatch:
    """Return a pack of one token without a completion: a pass over it joins all collectives and adds no gradient."""
    ids, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float32)
    return MicroBatch(
        token_ids_T=torch.zeros(1, dtype=torch.int64),
        position_ids_T=torch.zeros(1, dtype=torch.int64),
        segments=(PackedSegment(length=1),),
        loss_rows_C=ids,
        target_ids_C=ids,
        sequence_index_C=ids,
        behavior_logprobs_C=floats,
        advantages_S=floats,
        rollout_index_S=(),
    )
