"""Statistics of accumulated gradients for the loss scaler, in as few passes over them as the device allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.kernels import fused

_CHUNK = 2**19
"""Elements inspected at once on a CPU: 2 MiB of FP32, which stay in the cache over all passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Statistics of one gradient."""

    broken: int
    """Entries that are infinite or NaN."""
    nonzero: int
    """Entries that are not zero."""
    small: int
    """Non-zero entries below the smallest normal number of the compute format."""
    square: float
    """Sum of squares; infinite or NaN only if an entry is."""


@torch.no_grad()
def inspect(grads: Sequence[Tensor], smallest_normal: float) -> list[Inspection]:
    """Return the statistics of float32 gradients on one device.

    Squares are summed in FP32 over at most 2^19 entries, and these sums in float64.
    """
    if grads and all(fused(grad) and grad.is_contiguous() and grad.data_ptr() % 16 == 0 for grad in grads):
        # Imported here: it needs Triton, which a machine without a GPU may lack.
        from betterhalf.kernels import gradients

        rows = gradients.inspect(grads, smallest_normal)
    else:
        rows = [_inspect(grad, smallest_normal) for grad in grads]
    return [
        Inspection(broken=int(broken), nonzero=int(nonzero), small=int(small), square=_square(grad, square, broken))
        for grad, (broken, nonzero, small, square) in zip(grads, rows, strict=True)
    ]


def _square(grad: Tensor, square: float, broken: float) -> float:
    """Return the sum of squares, computed again in float64 if it has overflowed in FP32."""
    return square if broken or math.isfinite(square) else float(grad.double().square().sum())


def _inspect(grad: Tensor, smallest_normal: float) -> list[float]:
    """Return broken, nonzero, small and square, computed by torch's operations."""
    nonzero = small = square = 0.0
    memory = torch.empty(2, min(_CHUNK, grad.numel()), device=grad.device)
    for piece in torch.split(grad.reshape(-1), _CHUNK):
        magnitude, flags = memory[:, : piece.numel()]
        torch.abs(piece, out=magnitude)
        # Flags as FP32 numbers: booleans take five times as long to compute and ten times as long to count.
        zero = torch.eq(magnitude, 0.0, out=flags).sum()
        below = torch.lt(magnitude, smallest_normal, out=flags).sum()
        found = torch.stack([zero, below, torch.dot(magnitude, magnitude)]).tolist()
        nonzero += piece.numel() - found[0]
        small += found[1] - found[0]
        square += found[2]
    broken = 0.0 if math.isfinite(square) else float(grad.isfinite().logical_not_().count_nonzero())
    return [broken, nonzero, small, square]
