"""Padded tensors of other trainers, [batch, length] with a mask, as the packed tensors that this package computes with.

TRL, verl and others hold one row for each completion and mark its tokens in a mask: padding at either end, and holes
where an environment wrote. `token_layout` finds the C marked tokens once; `TokenLayout.take` then picks them out of
every tensor of the same shape. Gradients flow back to the padded tensor.

Axes: B rows of padded tensors, L their length, C completion tokens, S sequences.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.errors import InputError, PrecisionWarning


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """Places of the completion tokens in the tensors of a caller."""

    mask_BL: Tensor | None
    """bool [B, L]: completion tokens of padded tensors; None for packed ones."""
    sequence_index_C: Tensor
    """int64 [C]: row of each token, or the caller's sequence index."""
    num_sequences: int
    """B for padded tensors, rows without tokens included."""
    longest: int
    """Width L of padded tensors; length of the longest sequence of packed ones."""

    def take(self, values: Tensor, name: str) -> Tensor:
        """Return the values of the completion tokens: [B, L] or [C] -> [C].

        Raises:
            InputError: `values` is not a floating-point tensor, or has another shape than the mask or the index.
        """
        place = self.sequence_index_C if self.mask_BL is None else self.mask_BL
        _require_logprobs(values, name)
        if values.shape != place.shape:
            other = "sequence_index" if self.mask_BL is None else "mask"
            raise InputError(
                f"{name} has the shape {_shape(values)} and {other} {_shape(place)}. Both need a value for each token."
            )
        values = values.to(place.device)
        return values if self.mask_BL is None else values[self.mask_BL]

    def rows(self, values: Tensor, name: str) -> Tensor:
        """Return one value for each sequence: from [S], [B, 1], or a value for each token that is constant in its row.

        Raises:
            InputError: the shape does not fit, or the tokens of a row have different values.
        """
        _require_logprobs(values, name)
        values = values.to(self.sequence_index_C.device)
        if values.shape in ((self.num_sequences,), (self.num_sequences, 1)):
            return values.reshape(-1)
        values_C = self.take(values, name)
        rows_S = values_C.new_zeros(self.num_sequences).index_put((self.sequence_index_C,), values_C)
        if not bool((rows_S[self.sequence_index_C] == values_C).all()):
            raise InputError(
                f"{name} differs between the tokens of a completion. The losses here take one advantage for each "
                f"completion; pass {name} of the shape ({self.num_sequences},)."
            )
        return rows_S


def token_layout(
    like: Tensor, *, mask: Tensor | None = None, sequence_index: Tensor | None = None, num_sequences: int | None = None
) -> TokenLayout:
    """Return the places of the completion tokens in tensors of the shape of `like`.

    Args:
        like: [B, L] with `mask`, [C] with `sequence_index`; only its shape and device are used.
        mask: [B, L], bool or 0 and 1: true for completion tokens.
        sequence_index: integers [C], which sequence each token belongs to.
        num_sequences: number of sequences of a packed tensor; by default one more than the largest index.

    Raises:
        InputError: both or neither of `mask` and `sequence_index` are given, one does not fit, or `like` is not a
            tensor.
    """
    if (mask is None) == (sequence_index is None):
        raise InputError(
            "pass one of mask and sequence_index: mask=[batch, length] for padded tensors, sequence_index=[tokens] for "
            "packed ones."
        )
    _require_tensor(like, "logprobs")
    if mask is not None:
        if num_sequences is not None:
            raise InputError("num_sequences belongs to sequence_index; a mask has one row for each sequence.")
        return _padded(like, _checked_mask(mask))
    assert sequence_index is not None
    return _packed(like, sequence_index, num_sequences)


def wide(logprobs_C: Tensor, name: str) -> Tensor:
    """Return logprobs in FP32 or wider; warn if they are in half precision, whose rounding affects every result."""
    bits = torch.finfo(logprobs_C.dtype).bits
    if bits >= 32:
        return logprobs_C
    step = torch.finfo(logprobs_C.dtype).eps
    warnings.warn(
        f"{name} is {logprobs_C.dtype}, which rounds logprobs below -1 by {step / 2:.0e} and more. That is measured "
        "as well, and may be larger than the rest. Compute log-softmax in float32 and keep its result.",
        PrecisionWarning,
        stacklevel=4,
    )
    return logprobs_C.float()


def _padded(like: Tensor, mask_BL: Tensor) -> TokenLayout:
    mask_BL = mask_BL.to(like.device)
    rows_C = mask_BL.nonzero()[:, 0]
    return TokenLayout(
        mask_BL=mask_BL, sequence_index_C=rows_C, num_sequences=mask_BL.shape[0], longest=mask_BL.shape[1]
    )


def _checked_mask(mask: Tensor) -> Tensor:
    """Return a mask as bool [B, L]."""
    _require_tensor(mask, "mask")
    if mask.dim() != 2:
        raise InputError(f"mask has the shape {_shape(mask)}. It must be [batch, length], a row for each completion.")
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("mask has values besides 0 and 1. Mark completion tokens with 1 and all others with 0.")
    return mask.bool()


def _packed(like: Tensor, sequence_index: Tensor, num_sequences: int | None) -> TokenLayout:
    _require_tensor(sequence_index, "sequence_index")
    if sequence_index.dim() != 1 or sequence_index.is_floating_point() or sequence_index.dtype == torch.bool:
        raise InputError(
            f"sequence_index is {sequence_index.dtype} {_shape(sequence_index)}. It must be integers of the shape "
            "[tokens]: the number of each token's sequence."
        )
    index_C = sequence_index.to(like.device, torch.int64)
    largest = int(index_C.max()) if index_C.numel() else -1
    count = largest + 1 if num_sequences is None else num_sequences
    if index_C.numel() and (int(index_C.min()) < 0 or largest >= count):
        raise InputError(f"sequence_index has values outside 0 to {count - 1}. Number the sequences from 0.")
    longest = int(torch.bincount(index_C).max()) if index_C.numel() else 0
    return TokenLayout(mask_BL=None, sequence_index_C=index_C, num_sequences=count, longest=longest)


def _require_logprobs(values: object, name: str) -> None:
    _require_tensor(values, name)
    assert isinstance(values, Tensor)
    if not values.is_floating_point():
        raise InputError(f"{name} is {values.dtype}. It must be floating point.")


def _require_tensor(values: object, name: str) -> None:
    if not isinstance(values, Tensor):
        raise InputError(f"{name} is {type(values).__name__}. Pass a tensor, such as torch.as_tensor({name}).")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
