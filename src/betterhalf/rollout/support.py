"""The tokens that truncation keeps, as a sampler reports them: on the device, in the layout of `token_support`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf import ops
from betterhalf.token_support import bitmap_words


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSupport:
    """Tokens that could be drawn in each of B rows."""

    counts_B: Tensor
    """int64 [B]: number of tokens."""
    masses_B: Tensor
    """float32 [B]: their share of the probability before truncation."""
    words_BW: Tensor
    """int32 [B, W]: the tokens of each row, in its first `num_words` words; W is `bitmap_words`."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> RowSupport:
        """Apply a function to each of the tensors."""
        return RowSupport(
            counts_B=change(self.counts_B), masses_B=change(self.masses_B), words_BW=change(self.words_BW)
        )

    @classmethod
    def joined(cls, parts: Sequence[RowSupport]) -> RowSupport:
        """Concatenate the rows of several parts, at least one."""
        return cls(
            counts_B=torch.cat([part.counts_B for part in parts]),
            masses_B=torch.cat([part.masses_B for part in parts]),
            words_BW=torch.cat([part.words_BW for part in parts]),
        )


def row_support(scaled: Tensor, truncated: Tensor) -> RowSupport:
    """Return the tokens whose logits truncation did not set to minus infinity.

    Every shape depends on the shape of the logits alone, so that a CUDA graph can capture the computation.

    Args:
        scaled: logits before truncation, float32 [B, V].
        truncated: logits after truncation, float32 [B, V].
    """
    kept = truncated > -torch.inf
    weights, _ = ops.shifted_exp(scaled)
    counts = kept.sum(-1)
    return RowSupport(
        counts_B=counts,
        masses_B=ops.row_sums(weights * kept) / ops.row_sums(weights),
        words_BW=torch.where(counts.unsqueeze(-1) <= bitmap_words(kept.shape[-1]), _ids(kept), _bitmap(kept)),
    )


def _ids(kept: Tensor) -> Tensor:
    """Return the ids of the first W kept tokens of each row, int32 [B, W]; zeros follow if there are fewer."""
    rows, vocabulary = kept.shape
    words = bitmap_words(vocabulary)
    places = kept.cumsum(-1) - 1
    # Column W receives whatever does not fit, and is cut off.
    places = torch.where(kept & (places < words), places, words)
    ids = torch.arange(vocabulary, dtype=torch.int32, device=kept.device).expand(rows, -1)
    return ids.new_zeros(rows, words + 1).scatter_(-1, places, ids)[:, :words]


def _bitmap(kept: Tensor) -> Tensor:
    """Return a bit for each token, int32 [B, W]; those beyond the vocabulary are 0."""
    missing = 32 * bitmap_words(kept.shape[-1]) - kept.shape[-1]
    bits = F.pad(kept.to(torch.uint8), (0, missing)).view(kept.shape[0], -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits << places).sum(-1, dtype=torch.uint8).view(torch.int32)
