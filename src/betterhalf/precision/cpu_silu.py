"""SiLU on a CPU in which an element's bits depend on that element alone, for `engine.rounding = "exact"`.

torch's kernel computes the last few elements of a row, or of a thread's share, by another exponential than the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation


def silu(x: Tensor) -> Tensor:
    """Return x / (1 + exp(-x)) in FP32, any shape; not differentiable."""
    wide = x.float()
    return wide / wide.neg().exp_().add_(1)


class _SiluFunction(torch.autograd.Function):
    """x [...] -> silu(x), computed in FP32 and rounded once to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return silu(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_outputs[0], x)  # type: ignore[no-any-return]


class CpuSilu(nn.Module):
    """Replacement for the activation SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(x) in the dtype of x."""
        out = _SiluFunction.apply(x)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out


def use_cpu_silu(module: nn.Module) -> int:
    """Replace, in place, every SiLU inside `module`, and return their number."""
    found = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.SiLU, SiLUActivation)
    ]
    for parent, name in found:
        setattr(parent, name, CpuSilu())
    return len(found)
