"""Activations on a CPU in which an element's bits depend on that element alone, for `engine.rounding = "exact"`.

torch's kernels compute the last few elements of a row, or of a thread's share, with a different exponential function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

_Gradient = Callable[[Tensor, Tensor], Tensor]
"""(gradient of the result, x) -> gradient of x."""


def silu(x: Tensor) -> Tensor:
    """Return x / (1 + exp(-x)) in FP32, any shape; not differentiable."""
    wide = x.float()
    return wide / wide.neg().exp_().add_(1)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU by its tanh approximation in FP32, any shape; not differentiable.

    x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), with u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    wide = x.float()
    cubic = wide * wide * wide * 0.044715 + wide
    return wide / cubic.mul_(-2 * math.sqrt(2 / math.pi)).exp_().add_(1)


class _Function(torch.autograd.Function):
    """x [...] -> activation of x, computed in FP32 and rounded once to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activate: Callable[[Tensor], Tensor], gradient: _Gradient) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return activate(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.gradient(grad_outputs[0], x), None, None


def _silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]


def _gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


class CpuSilu(nn.Module):
    """Replacement for the activation SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(x) in the dtype of x."""
        out = _Function.apply(x, silu, _silu_gradient)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out


class CpuGeluTanh(nn.Module):
    """Replacement for the tanh approximation of the activation GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return gelu_tanh(x) in the dtype of x."""
        out = _Function.apply(x, gelu_tanh, _gelu_gradient)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out


def _replacement(part: nn.Module) -> nn.Module | None:
    if type(part) in (nn.SiLU, SiLUActivation):
        return CpuSilu()
    if type(part) is GELUTanh or (type(part) is nn.GELU and part.approximate == "tanh"):
        return CpuGeluTanh()
    return None


def use_cpu_activations(module: nn.Module) -> int:
    """Replace, in place, every SiLU and every tanh GELU inside `module`, and return their number."""
    found = [
        (parent, name, new)
        for parent in module.modules()
        for name, child in parent.named_children()
        if (new := _replacement(child)) is not None
    ]
    for parent, name, new in found:
        setattr(parent, name, new)
    return len(found)
