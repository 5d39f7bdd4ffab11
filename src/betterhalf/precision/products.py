"""Matrix products on a CPU by the faster of the two libraries inside torch, MKL and oneDNN, chosen by the processor.

torch gives FP32 products to MKL. On an AMD processor with AVX-512 oneDNN is about twice as fast; on Intel's the two are
equal forward and MKL is a third faster for gradients of weights (`benchmarks/products.py` measures both, docs/LOG.md
has the numbers). The choice is made by the maker's name, not by timing: other libraries add in another order, and a
run must repeat bit for bit. A weight packed into oneDNN's own blocks is the fastest for few rows on both; it takes the
place of the plain one. Sums are FP32 in every case; results of half operands are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 64
"""What a weight is packed for; products of other sizes take it as it is. Fewer than 32 would make a slow layout."""

_CACHED = 2**21
"""FP32 numbers that stay in a processor's cache."""
_FEWEST_COLUMNS = 256

_LESSER_PRECISION = "bf16"
"""What torch calls the setting under which oneDNN gets FP32 batches."""


def _onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies the format here; it refuses a half format that the processor lacks."""
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _plain_by_onednn() -> bool:
    """Whether oneDNN also gets FP32 products of weights that are not packed: not where MKL is at home."""
    # Older versions of torch do not tell the processor's name.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return _onednn() and not (torch._C.has_mkl and "intel" in capabilities.get("cpu_name", "").lower())


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right^T + bias`, without a gradient of its own.

    Args:
        left: [M, K], any strides.
        right: [N, K] in the same dtype, any strides, or a result of `packed`.
        bias: [N] in the same dtype.

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
    """Add `left @ right^T` in place: a gradient to the sum it belongs to.

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
    """The FP32 gradient that a backward pass may add to itself, in place of a tensor for autograd to add: there is one
    already, and nobody has asked to see what is added. `torch.autograd.grad` does not see it either."""
    grad = leaf.grad
    watched = leaf._backward_hooks or leaf._post_accumulate_grad_hooks
    return grad if grad is not None and grad.is_cpu and grad.dtype == torch.float32 and not watched else None


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """`left @ right^T` in memory that is there already, which for a large result spares more time than it seems.

    Args:
        out: float32 [M, N], contiguous.
        left: float32 [M, K].
        right: float32 [N, K], not `packed`.
    """
    if not (left.is_cpu and _plain_by_onednn()):
        torch.mm(left, right.t(), out=out)
        return
    # oneDNN brings its own memory: a part that stays in the processor's cache is copied for little.
    columns = max(_FEWEST_COLUMNS, _CACHED // max(1, left.shape[0]))
    for start in range(0, right.shape[0], columns):
        out[:, start : start + columns] = product(left, right[start : start + columns])


def _dense(matrix: Tensor) -> Tensor:
    """The matrix without gaps between its rows or columns: with gaps oneDNN falls back to a loop, hundreds of times
    slower."""
    if matrix.layout != torch.strided or matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for each of B pairs, without a gradient of its own; for some dozens of rows or more.

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
        total: float32 [B, M, N]; what one pair adds to is dense, and may be part of a larger tensor.
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


@contextmanager
def _onednn_gets_batches() -> Iterator[None]:
    # torch hands FP32 batches to oneDNN only when oneDNN may round their operands to BF16.
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
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
    """Whether oneDNN computes FP32 batches in FP32 even where it may do less: no AMX tiles, and a product shows it."""
    if torch.cpu._is_amx_tile_supported():
        return False
    left, right = (torch.rand(2, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found, exact = _bmm_by_onednn(left, right), torch.bmm(left.double(), right.double())
    return bool(((found - exact).abs() <= 128 * 2.0**-24 * exact).all())


def has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies the format itself; torch's fallback is ten times slower than FP32."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def packed(weight: Tensor) -> Tensor:
    """The matrix [N, K] in blocks, for `product` alone; on a GPU, or where oneDNN does not take it, the very tensor."""
    if weight.is_cuda or not (_onednn() and _onednn_takes(weight.dtype)):
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return out


def unpacked(weight: Tensor) -> Tensor:
    """The same matrix with ordinary strides: a copy of a packed one, a plain one itself."""
    return weight.to_dense() if weight.layout == torch._mkldnn else weight  # type: ignore[attr-defined]
