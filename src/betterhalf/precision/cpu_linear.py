"""Linear layers on a CPU, half or FP32: operands and results in the weight's dtype, products and sums in FP32.

With half operands this is what a tensor core does: it multiplies them exactly, adds in FP32, and rounds the result
once. A product of two FP16 (or BF16) numbers is exact in FP32, so an FP32 matrix product of widened operands is the
same computation. torch's own FP16 product on a CPU is an order of magnitude slower (`benchmarks/train_pass.py`
measures it). Half weights are widened once for each update, not once for each call.

FP32 models use the same layers: their products go to the faster library (`precision.products`), and the gradient of a
weight is added in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from betterhalf.precision.formats import dtype_name
from betterhalf.precision.islands import NO_ISLANDS, Islands
from betterhalf.precision.products import add_product, direct_sum, packed, product
from betterhalf.precision.roles import Precision
from betterhalf.precision.tiled_products import block_sizes, tiled_product


def widened_linear(
    x: Tensor, weight_wide: Tensor, bias_wide: Tensor | None, dtype: torch.dtype, *, tiled: bool = False
) -> Tensor:
    """Return `x @ weight^T + bias` with FP32 products and sums, rounded once to `dtype`; not differentiable.

    Args:
        x: [..., in], half or FP32; the values of FP32 tensors may be half numbers that were widened before.
        weight_wide: float32 [out, in], plain or `packed`; a half weight widened.
        bias_wide: float32 [out], a half bias widened, or None.
        dtype: format of the result; FP32 leaves it unrounded.
        tiled: compute each row independently of the others; see `tiled_product`.

    Returns:
        [..., out] in `dtype`, contiguous.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if tiled:
        out = tiled_product(rows, packed(weight_wide))
        out = out if bias_wide is None else out + bias_wide
        return out.to(dtype).view(*x.shape[:-1], weight_wide.shape[0])
    return product(rows, weight_wide, bias_wide).to(dtype).view(*x.shape[:-1], weight_wide.shape[0])


class Widened:
    """FP32 copy of a half tensor, refreshed only when the tensor has changed.

    Changes are detected by torch's version counter and the tensor's address. Writing through `.data` in place
    (`p.data.copy_(x)`) does not move the counter: use `p.copy_(x)` under `torch.no_grad()`. FSDP2 writes gathered
    weights without moving it, often to the same address: call `forget` after that.
    """

    def __init__(self, source: Tensor) -> None:
        """Remember `source`; the first call allocates the copy."""
        self.source = source
        self._wide: Tensor | None = None
        self._seen: Tensor | None = None
        self._version = -1

    def __call__(self) -> Tensor:
        """Return a float32 tensor with the source's shape and current values."""
        if self._wide is None or self._stale():
            self._refresh()
        assert self._wide is not None
        return self._wide

    def forget(self) -> None:
        """Copy the source again in the next call, whatever the version counter says."""
        self._seen = None

    def _stale(self) -> bool:
        if self._seen is None:
            return True
        moved = self._seen.data_ptr() != self.source.data_ptr() or self._seen.shape != self.source.shape
        return moved or self._version != self.source._version

    def _refresh(self) -> None:
        # Inference tensors cannot be saved for a later backward pass, and the first call may come from inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if self._wide is None or self._wide.shape != self.source.shape:
                self._wide = torch.empty_like(self.source, dtype=torch.float32)
            self._wide.copy_(self.source)
            # Keep the storage alive: if its address were reused for a new tensor, that one would look unchanged.
            self._seen, self._version = self.source.detach(), self.source._version


class _CpuLinearFunction(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] in one dtype, and FP32 copies of the last two -> [..., out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_wide: Tensor,
        bias_wide: Tensor | None,
        tiled: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_wide)
        ctx.weight = weight
        return widened_linear(x, weight_wide, bias_wide, dtype, tiled=tiled)

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
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
        return grad_x, grad_weight, grad_bias, None, None, None, None


def cpu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_wide: Tensor,
    bias_wide: Tensor | None,
    *,
    tiled: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `x @ weight^T + bias`, differentiable; result and each gradient are FP32 sums rounded once.

    Args:
        x: half or FP32, [..., in].
        weight: [out, in] in the same dtype. If it already has an FP32 gradient, the new one is added there, unrounded.
        bias: [out] in the same dtype, or None.
        weight_wide: `weight` in FP32.
        bias_wide: `bias` in FP32, or None.
        tiled: compute each row of the result independently of the others; the gradients are the same.
        dtype: format of the result; by default that of the weight.

    Returns:
        [..., out] in `dtype`.
    """
    assert x.dtype == weight.dtype, f"input is {x.dtype}, weight is {weight.dtype}"
    kind = weight.dtype if dtype is None else dtype
    out = _CpuLinearFunction.apply(x, weight, bias, weight_wide, bias_wide, tiled, kind)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class CpuLinear(nn.Module):
    """Replacement for an `nn.Linear` on a CPU, half or FP32: same parameters, same names, FP32 sums."""

    def __init__(self, linear: nn.Linear, *, tiled: bool = False) -> None:
        """Take over the parameters of `linear`, without a copy; its bias may be None.

        Raises:
            InputError: `tiled` is set, and this processor cannot compute rows independently.
        """
        super().__init__()
        self.tiled = tiled
        if tiled:
            block_sizes(linear.out_features, linear.in_features, torch.get_num_threads())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)
        self._weight_wide: Widened | None = None
        self._bias_wide: Widened | None = None

    def weight_wide(self) -> Tensor:
        """Return the weight as float32 [out, in]: a widened copy of a half weight, or the FP32 weight itself."""
        if self.weight.dtype == torch.float32:
            return self.weight.detach()
        if self._weight_wide is None or self._weight_wide.source is not self.weight:
            self._weight_wide = Widened(self.weight)
        return self._weight_wide()

    def bias_wide(self) -> Tensor | None:
        """Return the bias as float32 [out], or None without one."""
        if self.bias is None or self.bias.dtype == torch.float32:
            return None if self.bias is None else self.bias.detach()
        if self._bias_wide is None or self._bias_wide.source is not self.bias:
            self._bias_wide = Widened(self.bias)
        return self._bias_wide()

    def forget(self) -> None:
        """Widen weight and bias again in the next call; see `Widened.forget`."""
        for wide in (self._weight_wide, self._bias_wide):
            if wide is not None:
                wide.forget()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], both in the weight's dtype."""
        return cpu_linear(x, self.weight, self.bias, self.weight_wide(), self.bias_wide(), tiled=self.tiled)

    def extra_repr(self) -> str:
        """Return shape and format in the style of `nn.Linear`."""
        kind = dtype_name(self.weight.dtype)
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


def use_cpu_linear(module: nn.Module, precision: Precision, islands: Islands = NO_ISLANDS) -> int:
    """Replace, in place, every `nn.Linear` inside `module` except FP32 islands, if products on a CPU sum in FP32.

    The parameters may still be FP32: they get the compute dtype later, or in each pass. With `Precision.exact`
    layers of FP32 islands are replaced too. A linear layer that occurs twice stays one layer. State dict and parameters
    are unchanged.

    Args:
        module: its modules are named as `islands` names them.
        precision: compute dtype, device and kind of half products.
        islands: modules that will compute in FP32.

    Returns:
        Number of layers replaced; 0 on a GPU, and on a CPU that computes half products natively.

    Raises:
        InputError: rows must be independent (`Precision.exact`), and this processor's are not.
    """
    compute = precision.roles.compute_dtype
    if precision.device.type != "cpu" or not (compute == "fp32" or precision.fp32_sums(compute)):
        return 0
    replaced: dict[nn.Module, CpuLinear] = {}
    for prefix, parent in list(module.named_modules()):
        for name, child in parent.named_children():
            held = islands.hold(f"{prefix}.{name}.weight" if prefix else f"{name}.weight")
            if type(child) is nn.Linear and (precision.exact or not held):
                setattr(parent, name, replaced.setdefault(child, CpuLinear(child, tiled=precision.exact)))
    return len(replaced)
