"""Packs for timing a training pass: sequences of one length, in which every token except the first has a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf.batches import MicroBatch, PackedSegment


def pack_of(token_ids_NL: Tensor) -> MicroBatch:
    """Pack N sequences of L tokens end to end, on the device of int64 [N, L] token ids."""
    count, length = token_ids_NL.shape
    device = token_ids_NL.device
    rows_NL = torch.arange(count * length, device=device).view(count, length)
    losses = count * (length - 1)
    return MicroBatch(
        token_ids_T=token_ids_NL.flatten(),
        position_ids_T=torch.arange(length, device=device).repeat(count),
        segments=(PackedSegment(length=length),) * count,
        loss_rows_C=rows_NL[:, :-1].flatten(),
        target_ids_C=token_ids_NL[:, 1:].flatten(),
        sequence_index_C=torch.arange(count, device=device).repeat_interleave(length - 1),
        behavior_logprobs_C=torch.zeros(losses, device=device),
        advantages_S=torch.ones(count, device=device),
        rollout_index_S=tuple(range(count)),
    )


def random_ids(vocabulary: int, count: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Return int64 [count, length] token ids, drawn evenly from the vocabulary; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (count, length), generator=generator).to(device)
