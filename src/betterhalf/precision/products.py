"""Matrix products on a CPU by the faster of torch's two GEMM backends, MKL and oneDNN, for the CPU vendor.

torch computes FP32 products with MKL. On AMD processors with AVX-512 oneDNN is about twice as fast. On Intel processors
the two are equally fast in the forward pass, and MKL is a third faster for gradients of weights
(`benchmarks/products.py` measures both, docs/LOG.md has the numbers). The vendor's name decides, not a timing: the
libraries add in different orders, and a run must repeat bit for bit. A weight packed into oneDNN's blocked layout is
fastest for few rows on both vendors; it replaces the plain weight. Sums are FP32 in every case; results of half
operands are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 64
"""Number of rows that weights are packed for; products with any number of rows use them. Below 32, oneDNN picks a slow
layout."""

_CACHED = 2**21
"""FP32 numbers that fit in a processor's cache."""
_FEWEST_COLUMNS = 256
"""Smallest number of columns that `product_into` computes at once."""

_LESSER_PRECISION = "bf16"
"""Value of torch's setting with which it hands FP32 batches to oneDNN."""


def _onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies the format on this processor; it refuses half formats without hardware."""
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _plain_by_onednn() -> bool:
    """Return whether oneDNN also computes products of plain weights: where it exists, except on Intel CPUs with MKL."""
    # Older versions of torch do not report the processor's name.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return _onednn() and not (torch._C.has_mkl and "intel" in capabilities.get("cpu_name", "").lower())


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `left @ right^T + bias`; not differentiable.

    Args:
        left: [M, K], any strides.
        right: [N, K] in the same dtype, any strides, or a result of `packed`.
        bias: [N] in the same dtype, or None.

    Returns:
        [M, N] in the same dtype, contiguous; FP32 sums.
    """
    if right.layout == torch.strided and not (left.is_cpu and _plain_by_onednn() and _onednn_takes(left.dtype)):
        return F.linear(left, right, bias)
    if not left.numel():
        return left.new_zeros(left.shape[0], right.shape[0]) + (0 if bias is None else bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, "none", [], "")
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right^T` to `total` in place, as for a gradient.

    Args:
        total: float32 [M, N], dense.
        left: float32 [M, K], any strides.
        right: float32 [N, K], any strides, not `packed`.
    """
    if left.is_cpu and _plain_by_onednn():
        total += product(left, right)
    else:
        total.addmm_(left, right.t())


def direct_sum(leaf: Tensor) -> Tensor | None:
    """Return the leaf's FP32 gradient if a backward pass may add to it in place; None if autograd has to add.

    The gradient must exist already, on a CPU, and the leaf must have no hooks, which would not see what is added.
    `torch.autograd.grad` does not see it either. A tensor that is not a leaf, such as a view of one, has no gradient.
    """
    if not leaf.is_leaf:
        return None
    grad = leaf.grad
    hooked = leaf._backward_hooks or leaf._post_accumulate_grad_hooks
    return grad if grad is not None and grad.is_cpu and grad.dtype == torch.float32 and not hooked else None


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write `left @ right^T` to existing memory, which saves considerable time for a large result.

    Args:
        out: float32 [M, N], contiguous.
        left: float32 [M, K].
        right: float32 [N, K], not `packed`.
    """
    if not (left.is_cpu and _plain_by_onednn()):
        torch.mm(left, right.t(), out=out)
        return
    # oneDNN allocates its result; a piece that stays in the processor's cache is cheap to copy.
    columns = max(_FEWEST_COLUMNS, _CACHED // max(1, left.shape[0]))
    for start in range(0, right.shape[0], columns):
        out[:, start : start + columns] = product(left, right[start : start + columns])


def _dense(matrix: Tensor) -> Tensor:
    """Return the matrix without gaps between rows or columns; oneDNN is hundreds of times slower with gaps."""
    if matrix.layout != torch.strided or matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` for each of B pairs; not differentiable, and meant for a few dozen rows or more.

    Args:
        left: [B, M, K], any dtype and strides.
        right: [B, K, N] in the same dtype.

    Returns:
        [B, M, N] in the same dtype; FP32 sums, rounded once.
    """
    if not (left.is_cpu and left.dtype == torch.float32 and _batched_by_onednn()):
        return torch.bmm(left, right)
    return _bmm_by_onednn(left, right)


def add_batched_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total` in place, for each of B pairs.

    Args:
        total: float32 [B, M, N]; each [M, N] matrix is dense, and may be part of a larger tensor.
        left: [B, M, K], any dtype; a half product is rounded before it is added.
        right: [B, K, N] in the same dtype.
    """
    if left.dtype != torch.float32:
        total += torch.bmm(left, right)
    elif left.is_cpu and _batched_by_onednn():
        with _onednn_gets_batches():
            total.baddbmm_(left, right)
    else:
        total.baddbmm_(left, right)


def _bmm_by_onednn(left: Tensor, right: Tensor) -> Tensor:
    with _onednn_gets_batches():
        return torch.bmm(left, right)


_one_switch = Lock()


@contextmanager
def _onednn_gets_batches() -> Iterator[None]:
    # torch hands FP32 batches to oneDNN only if oneDNN may round their operands to BF16. The setting is the whole
    # process's: with two threads that change it at once, the later one could keep the other's value for good.
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _one_switch:
        before = settings.fp32_precision
        settings.fp32_precision = _LESSER_PRECISION
        try:
            yield
        finally:
            settings.fp32_precision = before


def _batched_by_onednn() -> bool:
    return _plain_by_onednn() and _exact_batches()


@cache
def _exact_batches() -> bool:
    """Return whether oneDNN computes FP32 batches in FP32 although it is allowed to round their operands.

    With AMX tiles it may round them, so the answer is False; elsewhere a test product decides.
    """
    if torch.cpu._is_amx_tile_supported():
        return False
    left, right = (torch.rand(2, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found, exact = _bmm_by_onednn(left, right), torch.bmm(left.double(), right.double())
    return bool(((found - exact).abs() <= 128 * 2.0**-24 * exact).all())


def has_native_matmul(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies BF16 natively; always True for FP32, and False for FP16.

    Without BF16 instructions, torch's own products are ten times slower than FP32. FP16 counts as not native even where
    the processor has FP16 instructions: widened operands are as fast, and round alike on every machine.
    """
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def packed(weight: Tensor) -> Tensor:
    """Return [N, K] in oneDNN's blocked layout, which only `product` reads; `weight` itself where that is impossible.

    That is the case on a GPU, without oneDNN, and for formats that oneDNN does not multiply on this processor.
    """
    if weight.is_cuda or not (_onednn() and _onednn_takes(weight.dtype)):
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return out


def unpacked(weight: Tensor) -> Tensor:
    """Return the matrix with ordinary strides: a copy of a packed one, a plain one itself."""
    return weight.to_dense() if weight.layout == torch._mkldnn else weight  # type: ignore[attr-defined]
