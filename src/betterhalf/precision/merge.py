"""Merge of a LoRA adapter into the weight it adapts: in FP32, rounded once.

The trainer multiplies by the base, rounded to the compute dtype, and by the adapter, one after the other. The weight
that it applies is `base + scale * B @ A`, in real numbers. The engine's is the number of its own format nearest to that
sum as FP32 computes it: up to FP32's own rounding, no weight of that format differs less from the trainer's. Rounding
the product to half before it is added, or adding increments to a half weight, would round to half twice.

A product below half the distance between two numbers of the format leaves the weight where it was; `MergeCount` counts
these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.precision.emulation import to_format
from betterhalf.types import DtypeName


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeCount:
    """Weights that adapters change, and those of them that rounding leaves at the base's value."""

    changed: int
    """Number of weights whose product of the adapter is not 0."""
    lost: int
    """Number of these whose merged value is the base's."""

    @property
    def lost_fraction(self) -> float | None:
        """Share of the changed weights that are lost; None if no weight is changed."""
        return self.lost / self.changed if self.changed else None


@torch.no_grad()
def merge_rows(base: Tensor, down: Tensor, up: Tensor, scale: float, name: DtypeName) -> tuple[Tensor, Tensor]:
    """Merge some rows of a weight.

    Args:
        base: [rows, in], the frozen weight as the trainer computes with it.
        down: float32 [rank, in].
        up: float32 [rows, rank].
        scale: factor of `up @ down`.
        name: format of the result.

    Returns:
        [rows, in] in `name`, and int64 [2]: the numbers of `MergeCount`.
    """
    product = torch.mm(up.float(), down.float()).mul_(scale)
    merged = to_format(product + base.float(), name)
    changed = product != 0
    lost = changed & (merged == to_format(base.float(), name))
    return merged, torch.stack([changed.sum(), lost.sum()])
