"""Products of groups of rows, each with a matrix of its own, as in a mixture of experts.

The rules are those of a linear layer: FP32 sums, and one rounding of the result and of each gradient. With FP32
operands (half ones that were widened, on a CPU) the products are FP32 products; with half operands they are those of
the hardware.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from betterhalf.precision.products import add_product, direct_sum, packed, product
from betterhalf.precision.tiled_products import tiled_product


class _GroupedFunction(torch.autograd.Function):
    """rows [N, in] ordered by group, weight [E, out, in], operands of the same values -> [N, out]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, operand: Tensor, counts: tuple[int, ...], tiled: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, operand)
        ctx.weight, ctx.counts = weight, counts
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        for group, part in _groups(counts):
            left = rows[part].to(operand.dtype)
            out[part] = tiled_product(left, packed(operand[group])) if tiled else product(left, operand[group])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, operand = ctx.saved_tensors
        grad = grad_outputs[0].to(operand.dtype)
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = direct_sum(ctx.weight) if ctx.needs_input_grad[1] else None
        alone = ctx.needs_input_grad[1] and total is None
        of_weight = torch.zeros_like(ctx.weight) if alone else None
        for group, part in _groups(ctx.counts):
            if of_rows is not None:
                of_rows[part] = product(grad[part], operand[group].t())
            left, right = grad[part].t(), rows[part].to(operand.dtype).t()
            if total is not None:
                add_product(total[group], left, right)
            elif of_weight is not None:
                of_weight[group] = product(left, right)
        return of_rows, of_weight, None, None, None


def grouped_product(
    rows: Tensor, weight: Tensor, operand: Tensor, counts: Sequence[int], *, tiled: bool = False
) -> Tensor:
    """Return each row times the transposed matrix of its group, differentiable.

    Args:
        rows: [N, in], those of the first group first.
        weight: [E, out, in] in the same dtype. If it has an FP32 gradient, the new one is added there, unrounded.
        operand: the values of `weight`: float32 for FP32 products, or `weight` itself for those of the hardware.
        counts: number of rows of each of the E groups; they sum to N.
        tiled: compute each row of the result independently of the others (CPU); the gradients are the same.

    Returns:
        [N, out] in the dtype of `rows`, rounded once.
    """
    assert rows.dtype == weight.dtype, f"rows are {rows.dtype}, weight is {weight.dtype}"
    out = _GroupedFunction.apply(rows, weight, operand, tuple(counts), tiled)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def _groups(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (index, rows) of each group that has rows."""
    for group, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0))):
        if stop > start:
            yield group, slice(start, stop)
