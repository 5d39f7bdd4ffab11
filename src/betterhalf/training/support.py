"""The sets to which sampling was truncated, for the trainer: it normalises each row of logits over the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.token_support import PackedSupport, bitmap_words


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportMask:
    """Places of the supported tokens in the logits of C rows; a mask of all of them would take [C, V]."""

    single_C: Tensor
    """bool [C]: true for rows with one supported token, whose logprob is 0 whatever the logits are."""
    whole_C: Tensor
    """bool [C]: true for rows whose support is the whole vocabulary."""
    listed_rows_K: Tensor
    """int64 [K]: row of each supported token that is listed by its id."""
    listed_ids_K: Tensor
    """int64 [K]: its id."""
    bitmap_rows_N: Tensor
    """int64 [N]: rows whose supported tokens are held as a bitmap."""
    bitmaps_NX: Tensor
    """uint8 [N, X]: these bitmaps; bit v % 8 of byte v // 8."""

    @classmethod
    def of(cls, support: PackedSupport | None) -> SupportMask | None:
        """Decode the sets of a pack, None if it has none; see `token_support` for the layout."""
        if support is None:
            return None
        counts_C, words = support.counts_C, bitmap_words(support.vocabulary)
        rows_C = torch.arange(counts_C.shape[0], device=counts_C.device)
        whole_C = counts_C == support.vocabulary
        sizes_C = counts_C.clamp(max=words).masked_fill(whole_C, 0)
        in_bitmap_C = (counts_C > words) & ~whole_C
        rows_K = rows_C.repeat_interleave(sizes_C)
        in_bitmap_K = in_bitmap_C[rows_K]
        return cls(
            single_C=counts_C == 1,
            whole_C=whole_C,
            listed_rows_K=rows_K[~in_bitmap_K],
            listed_ids_K=support.words_K[~in_bitmap_K].long(),
            bitmap_rows_N=rows_C[in_bitmap_C],
            bitmaps_NX=support.words_K[in_bitmap_K].view(-1, words).view(torch.uint8),
        )

    def restrict(self, logits: Tensor, *, row: int = 0, column: int = 0) -> None:
        """Set the logits of all unsupported tokens to minus infinity, in place.

        Args:
            logits: float32, a block of some rows and columns of the logits [C, V].
            row: first row of the block.
            column: first token of the block.
        """
        rows, columns = logits.shape
        removed = ~self.whole_C[row : row + rows].unsqueeze(1).repeat(1, columns)
        here = _within(self.listed_rows_K, row, rows) & _within(self.listed_ids_K, column, columns)
        removed[self.listed_rows_K[here] - row, self.listed_ids_K[here] - column] = False
        here = _within(self.bitmap_rows_N, row, rows)
        removed[self.bitmap_rows_N[here] - row] = ~_bits(self.bitmaps_NX[here], column, columns)
        logits.masked_fill_(removed, -torch.inf)


def _within(indices: Tensor, start: int, count: int) -> Tensor:
    return (indices >= start) & (indices < start + count)


def _bits(bitmaps_NX: Tensor, start: int, count: int) -> Tensor:
    """Return the bits of some tokens, bool [N, count]."""
    first = start // 8
    some = bitmaps_NX[:, first : -(-(start + count) // 8)].unsqueeze(-1)
    bits = (some >> torch.arange(8, dtype=torch.uint8, device=some.device)) & 1
    return bits.flatten(1)[:, start - 8 * first :][:, :count].bool()
