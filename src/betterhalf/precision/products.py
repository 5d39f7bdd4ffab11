"""Matrix products on a CPU by the faster of the two libraries inside torch: oneDNN where torch was built with it.

torch gives FP32 products to MKL, which on an AMD processor with AVX-512 is half as fast as oneDNN
(`benchmarks/products.py` measures both, docs/LOG.md has the numbers). oneDNN's inner product takes the second operand
in rows, as a linear layer holds its weight, plain, transposed or packed into blocks of its own: packed is faster for
few rows, and a packed tensor takes the place of the plain one. Sums are FP32 in every case; results of BF16 operands
are rounded once to BF16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 64
"""What a weight is packed for; products of other sizes take it as it is. Fewer than 32 would make a slow layout."""


def _onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right^T + bias`, without a gradient of its own.

    Args:
        left: [M, K], float32 or bfloat16, any strides; oneDNN is for a CPU.
        right: [N, K] in the same dtype, any strides, or a result of `packed`.
        bias: [N] in the same dtype.

    Returns:
        [M, N] in the same dtype, contiguous; FP32 sums.
    """
    if not (left.is_cpu and _onednn()):
        return F.linear(left, right, bias)
    if not left.numel():
        return left.new_zeros(left.shape[0], right.shape[0]) + (0 if bias is None else bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, "none", [], "")
    return out


def _dense(matrix: Tensor) -> Tensor:
    """The matrix without gaps between its rows or columns: with gaps oneDNN falls back to a loop, hundreds of times
    slower."""
    if matrix.layout != torch.strided or matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def packed(weight: Tensor) -> Tensor:
    """The matrix [N, K] in blocks, for `product` alone; where there is no oneDNN, or on a GPU, the very tensor."""
    if weight.is_cuda or not _onednn():
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return out


def unpacked(weight: Tensor) -> Tensor:
    """The same matrix with ordinary strides: a copy of a packed one, a plain one itself."""
    return weight.to_dense() if weight.layout == torch._mkldnn else weight  # type: ignore[attr-defined]
