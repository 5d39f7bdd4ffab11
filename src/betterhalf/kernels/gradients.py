"""Gradients of parameters: accumulation in FP32, and statistics for the loss scaler, in one pass each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Numbers that a program holds at once."""
_PART = 4 * _BLOCK
"""Numbers of one gradient that a program of `inspect` reads in total."""


@triton.jit
def _accumulate(total, share, numbers, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(share + place, mask=place < numbers, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(total + place, mask=place < numbers, other=0.0)
    tl.store(total + place, x, mask=place < numbers)


def accumulate(total: Tensor, share: Tensor, *, empty: bool) -> None:
    """Add a half gradient to an FP32 one of the same shape; with `empty`, overwrite that one. Both are contiguous."""
    if total.numel():
        grid = (triton.cdiv(total.numel(), _BLOCK),)
        _accumulate[grid](total, share, total.numel(), ADDS=not empty, BLOCK=_BLOCK, num_warps=8)


@triton.jit
def _inspect(addresses, sizes, owners, first_parts, out, smallest_normal, PART: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + part)
    gradient = tl.multiple_of(tl.load(addresses + owner).to(tl.pointer_type(tl.float32)), 16)
    numbers = tl.load(sizes + owner)
    begin = (part - tl.load(first_parts + owner)) * PART
    broken = tl.zeros([BLOCK], tl.int32)
    nonzero = tl.zeros([BLOCK], tl.int32)
    small = tl.zeros([BLOCK], tl.int32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PART, BLOCK):
        place = begin + start + tl.arange(0, BLOCK)
        # A load without a mask reads several numbers at once.
        if begin + PART <= numbers:
            x = tl.abs(tl.load(gradient + place))
        else:
            x = tl.abs(tl.load(gradient + place, mask=place < numbers, other=0.0))
        # inf - inf is NaN, and NaN != 0.
        broken += ((x - x) != 0.0).to(tl.int32)
        nonzero += (x != 0.0).to(tl.int32)
        small += ((x != 0.0) & (x < smallest_normal)).to(tl.int32)
        square += x * x
    tl.store(out + part * 4, tl.sum(broken, 0).to(tl.float32))
    tl.store(out + part * 4 + 1, tl.sum(nonzero, 0).to(tl.float32))
    tl.store(out + part * 4 + 2, tl.sum(small, 0).to(tl.float32))
    tl.store(out + part * 4 + 3, tl.sum(square, 0))


@triton.jit
def _add_parts(table, first_parts, out, BLOCK: tl.constexpr):
    owner = tl.program_id(0)
    column = tl.arange(0, 4)
    total = tl.zeros([BLOCK, 4], tl.float64)
    end = tl.load(first_parts + owner + 1)
    for start in range(tl.load(first_parts + owner), end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        held = (row < end)[:, None] & (column >= 0)[None, :]
        total += tl.load(table + row[:, None] * 4 + column[None, :], mask=held, other=0.0).to(tl.float64)
    tl.store(out + owner * 4 + column, tl.sum(total, 0))


def inspect(gradients: Sequence[Tensor], smallest_normal: float) -> list[list[float]]:
    """Return the statistics of gradients that the loss scaler needs.

    One launch covers all gradients: a launch for each of hundreds of parameters takes longer than reading them.

    Args:
        gradients: at least one gradient, float32, contiguous, aligned to 16 bytes, all on one GPU.
        smallest_normal: smallest normal number of the format they were computed in.

    Returns:
        Four numbers for each gradient: the counts of non-finite entries, of non-zero entries, and of non-zero entries
        below the smallest normal number, and the sum of squares. Squares are summed in FP32 over at most 2^14
        entries, and these sums in float64.
    """
    device, parts = gradients[0].device, [triton.cdiv(gradient.numel(), _PART) for gradient in gradients]
    addresses, sizes, counts, first_parts = torch.tensor(
        [
            [*(gradient.data_ptr() for gradient in gradients), 0],
            [*(gradient.numel() for gradient in gradients), 0],
            [*parts, 0],
            [0, *itertools.accumulate(parts)],
        ]
    ).to(device)
    owners = torch.repeat_interleave(counts, output_size=sum(parts))
    table = torch.empty(sum(parts), 4, dtype=torch.float32, device=device)
    sums = torch.empty(len(gradients), 4, dtype=torch.float64, device=device)
    if owners.shape[0]:
        _inspect[(owners.shape[0],)](
            *(addresses, sizes, owners, first_parts, table), smallest_normal, PART=_PART, BLOCK=_BLOCK, num_warps=8
        )
    _add_parts[(len(gradients),)](table, first_parts, sums, BLOCK=256, num_warps=4)
    found: list[list[float]] = sums.tolist()
    return found
