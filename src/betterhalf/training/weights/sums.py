"""FP32 sums of half gradients, each added as soon as the backward pass of a micro-batch has rounded it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from betterhalf.kernels import fused

_CACHED = 2**19
"""Number of gradient entries added at a time on a CPU: 2 MiB in FP32."""


def collect_into(total: Callable[[], Tensor], parameter: Tensor, name: str, collected: set[str]) -> None:
    """Add every gradient of a half parameter to an FP32 sum as soon as it is computed, and free it.

    Args:
        total: returns the sum, float32 in the shape of the parameter. It must not refer to the parameter: a hook that
            does so is a cycle through C++, which is never collected.
        parameter: leaf that receives half gradients.
        name: of the parameter.
        collected: names of the sums that hold a gradient; the content of any other is stale. `name` is added.
    """

    def collect(leaf: Tensor) -> None:
        assert leaf.grad is not None
        add_gradient(total(), leaf.grad, empty=name not in collected)
        collected.add(name)
        leaf.grad = None

    parameter.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]


def add_gradient(total: Tensor, gradient: Tensor, *, empty: bool) -> None:
    """Add a dense or sparse gradient to an FP32 sum in place.

    Args:
        total: float32.
        gradient: half or FP32, of the same shape.
        empty: the content of `total` is stale and is overwritten.
    """
    if gradient.is_sparse:
        _add_rows(total, gradient, empty=empty)
    else:
        _add(total, gradient, empty=empty)


def _add(total: Tensor, half: Tensor, *, empty: bool) -> None:
    """Add a gradient to the FP32 `total`; with `empty`, the content of `total` is stale and is overwritten."""
    if fused(half) and half.is_contiguous() and total.is_contiguous():
        # Imported only on a GPU, because it needs Triton.
        from betterhalf.kernels import gradients

        gradients.accumulate(total, half, empty=empty)
        return
    if empty:
        total.copy_(half)
        return
    # torch widens the whole operand first; a part at a time, the result stays in the CPU's cache.
    rows = max(1, _CACHED * total.shape[0] // max(1, total.numel())) if total.is_cpu else total.shape[0]
    for part, share in zip(torch.split(total, rows), torch.split(half, rows), strict=True):
        part.add_(share)


def _add_rows(total: Tensor, sparse: Tensor, *, empty: bool) -> None:
    """Add a sparse gradient to the FP32 `total`; with `empty`, the content of `total` is stale and is discarded."""
    if empty:
        total.zero_()
    rows = sparse.coalesce()
    total.index_add_(0, rows.indices()[0], rows.values().float())
