"""Triton kernels for a GPU, each several of torch's operations in one pass over memory.

    decoding     the native engine between its matrix products: residual and norm, rope and cache, SwiGLU
    attention    one new token of each sequence over the engine's cache
    vocabulary   rows of logits: normaliser, entropy, gradient, sums of neighbours to draw from
    gradients    what the loss scaler looks for

What they compute is defined by the operations they replace, in the same formats and with the same roundings; sums may
be in another order. Tests run them on a CPU by Triton's interpreter. Import the modules only where `fused` allows it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def fused(x: Tensor) -> bool:
    """Whether the kernels can compute on this tensor: it lies on a GPU, and Triton, which torch brings, is there."""
    return x.is_cuda and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
