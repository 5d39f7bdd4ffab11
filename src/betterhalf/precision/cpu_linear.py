"""Half-precision linear layers on a CPU: operands and results on the half grid, products and sums in FP32.

A tensor core does the same: it multiplies half operands exactly, adds in FP32, and rounds the result once. A product
of two FP16 (or BF16) numbers is exact in FP32, so an FP32 matrix product of widened operands is that computation;
torch's own FP16 product on a CPU is an order of magnitude slower (`benchmarks/train_pass.py` measures it).

Weights are widened once for each update, not once for each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from betterhalf.precision.formats import dtype_name
from betterhalf.precision.products import add_product, direct_sum, product
from betterhalf.precision.roles import Precision


def widened_linear(x: Tensor, weight_wide: Tensor, bias_wide: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x @ weight^T + bias` with products and sums in FP32, rounded once to `dtype`; no gradient of its own.

    Args:
        x: [..., in], half, or FP32 with values on the half grid (then nothing is widened).
        weight_wide: float32 [out, in], half-grid values, plain or `packed`.
        bias_wide: float32 [out], half-grid values, or None.
        dtype: of the result; FP32 leaves it unrounded.

    Returns:
        [..., out] in `dtype`, contiguous.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    return product(rows, weight_wide, bias_wide).to(dtype).view(*x.shape[:-1], weight_wide.shape[0])


class Widened:
    """The FP32 copy of a half tensor, made anew only when the tensor has changed.

    Changes are seen through torch's version counter and the tensor's address. Writing through `.data` in place
    (`p.data.copy_(x)`) evades the counter: use `p.copy_(x)` under `torch.no_grad()`.
    """

    def __init__(self, source: Tensor) -> None:
        """Watch `source`; nothing is allocated before the first call."""
        self.source = source
        self._wide: Tensor | None = None
        self._seen: Tensor | None = None
        self._version = -1

    def __call__(self) -> Tensor:
        """float32, same shape and values as the source now."""
        if self._wide is None or self._stale():
            self._refresh()
        assert self._wide is not None
        return self._wide

    def _stale(self) -> bool:
        assert self._seen is not None
        moved = self._seen.data_ptr() != self.source.data_ptr() or self._seen.shape != self.source.shape
        return moved or self._version != self.source._version

    def _refresh(self) -> None:
        # Inference tensors cannot be saved for a later backward pass, and a no-grad pass may be the first to come here.
        with torch.inference_mode(False), torch.no_grad():
            if self._wide is None or self._wide.shape != self.source.shape:
                self._wide = torch.empty_like(self.source, dtype=torch.float32)
            self._wide.copy_(self.source)
            # Holding the storage keeps its address from being given to a replacement, which would look unchanged.
            self._seen, self._version = self.source.detach(), self.source._version


class _CpuLinearFunction(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] in half and their widened copies -> [..., out] in half."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weight_wide: Tensor, bias_wide: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight_wide)
        ctx.weight = weight
        return widened_linear(x, weight_wide, bias_wide, weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight_wide = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad_outputs[0].reshape(-1, weight_wide.shape[0]).float()
        grad_x = product(grad, weight_wide.t()).to(x.dtype).view(x.shape) if need_x else None
        rows = x.reshape(-1, x.shape[-1]).float()
        total = direct_sum(ctx.weight) if need_weight else None
        if total is not None:
            add_product(total, grad.t(), rows.t())
            need_weight = False
        grad_weight = product(grad.t(), rows.t()).to(x.dtype) if need_weight else None
        grad_bias = grad.sum(0).to(x.dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, weight_wide: Tensor, bias_wide: Tensor | None) -> Tensor:
    """Differentiable `x @ weight^T + bias`; result and each gradient are FP32 sums rounded once.

    Args:
        x: half [..., in].
        weight: [out, in] in the same dtype; receives its gradient, in FP32 directly if it has one already.
        bias: [out] in the same dtype, or None.
        weight_wide: `weight` in FP32.
        bias_wide: `bias` in FP32.

    Returns:
        [..., out] in the same dtype.
    """
    assert x.dtype == weight.dtype, f"input is {x.dtype}, weight is {weight.dtype}"
    out = _CpuLinearFunction.apply(x, weight, bias, weight_wide, bias_wide)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class CpuLinear(nn.Module):
    """Takes the place of an `nn.Linear` with half parameters: same parameters, same names, FP32 sums."""

    def __init__(self, linear: nn.Linear) -> None:
        """Adopt the very parameters of `linear`; its bias may be None."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)
        self._weight_wide: Widened | None = None
        self._bias_wide: Widened | None = None

    def weight_wide(self) -> Tensor:
        """float32 [out, in]: the weight as the products use it; an FP32 weight is used itself."""
        if self.weight.dtype == torch.float32:
            return self.weight.detach()
        if self._weight_wide is None or self._weight_wide.source is not self.weight:
            self._weight_wide = Widened(self.weight)
        return self._weight_wide()

    def bias_wide(self) -> Tensor | None:
        """float32 [out], or None."""
        if self.bias is None or self.bias.dtype == torch.float32:
            return None if self.bias is None else self.bias.detach()
        if self._bias_wide is None or self._bias_wide.source is not self.bias:
            self._bias_wide = Widened(self.bias)
        return self._bias_wide()

    def forward(self, x: Tensor) -> Tensor:
        """Half [..., in] -> half [..., out]."""
        return cpu_linear(x, self.weight, self.bias, self.weight_wide(), self.bias_wide())

    def extra_repr(self) -> str:
        """Shape and format, as `nn.Linear` prints them."""
        kind = dtype_name(self.weight.dtype)
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


def use_cpu_linear(module: nn.Module, precision: Precision) -> int:
    """Replace, in place, every `nn.Linear` inside `module` that holds the compute dtype, if the policy sums in FP32.

    A linear layer that occurs twice stays one layer. State dict and parameters are unchanged.

    Returns:
        How many layers were replaced; 0 when the policy computes half products natively.
    """
    compute = precision.roles.compute_dtype
    if precision.device.type != "cpu" or not (compute == "fp32" or precision.fp32_sums(compute)):
        return 0
    replaced: dict[nn.Module, CpuLinear] = {}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.dtype == precision.compute_dtype:
                setattr(parent, name, replaced.setdefault(child, CpuLinear(child)))
    return len(replaced)
