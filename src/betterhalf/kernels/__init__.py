"""Triton kernels for a GPU; each replaces several torch operations by one pass over memory.

    decoding     decode step of the native engine between its matrix products: residual and norm, rope and cache, SwiGLU
    attention    one new token of each sequence over the engine's cache
    vocabulary   rows of logits: scores of tokens, entropy, gradient, drawing tokens
    gradients    accumulation in FP32, and statistics for the loss scaler

A kernel is defined by the operations that it replaces: it uses the same formats and rounds at the same points, but may
sum in another order. Tests run the kernels on a CPU in Triton's interpreter. Import the modules only where `fused`
allows it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def fused(x: Tensor) -> bool:
    """Return whether the kernels can compute on this tensor: it is on a GPU, and Triton is installed."""
    return x.is_cuda and has_triton()


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; torch brings it where it supports GPUs."""
    return find_spec("triton") is not None
