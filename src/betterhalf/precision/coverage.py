"""Check that the precision rules cover a model's linear operations, and test whether those sum in FP32.

The rules are written for `nn.Linear` and `nn.Embedding`. Weights used in any other way (a subclass, a Conv1D, experts
in one 3-D parameter, `F.linear` on another module's weight) would silently round and sum by other rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from betterhalf.errors import InputError
from betterhalf.precision.cpu_embedding import CpuEmbedding
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.roles import Precision

# -- coverage


def require_covered(module: nn.Module, precision: Precision) -> None:
    """Refuse weights outside the layers that have a precision rule; FP32 needs no rule and passes.

    Call it after the parameters have the compute dtype and `use_cpu_linear` and `use_cpu_embedding` have replaced
    their layers.

    Raises:
        InputError: a module outside those layers holds a parameter of two or more axes; the message names it.
    """
    if precision.roles.compute_dtype == "fp32":
        return
    bare = [
        f"{name or 'the model'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if any(p.is_floating_point() and p.dim() > 1 for p in part.parameters(recurse=False))
        and not _covered(part, precision)
    ]
    if bare:
        raise InputError(_uncovered(bare, precision))


def _covered(part: nn.Module, precision: Precision) -> bool:
    """Return whether a precision rule covers the module; a subclass of a covered layer may compute anything."""
    sums = precision.fp32_sums(precision.roles.compute_dtype)
    if type(part) is nn.Linear:
        return part.weight.dtype == torch.float32 or not sums
    if type(part) is nn.Embedding:
        return precision.device.type != "cpu" or part.weight.dtype == torch.float32
    return type(part) in (CpuLinear, CpuEmbedding)


def _uncovered(names: Sequence[str], precision: Precision) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the precision rules of {precision.roles.compute_dtype} cover nn.Linear and nn.Embedding, but the model also "
        f"multiplies by weights in {shown}; train it with precision=fp32, or use a model such as llama, mistral, "
        "qwen2 or qwen3"
    )


def require_no_half_products(module: nn.Module, precision: Precision, run: Callable[[], object]) -> None:
    """Refuse a model that multiplies half tensors outside its covered layers although products must have FP32 sums.

    Args:
        module: model; the message names its parameters.
        precision: where it does not ask for FP32 sums on a CPU, half products are native and nothing is checked.
        run: performs a forward pass of `module`.

    Raises:
        InputError: a product has half operands; the message names those that are parameters.
    """
    if not precision.fp32_sums(precision.roles.compute_dtype):
        return
    with torch.no_grad(), _HalfProducts() as seen:
        run()
    if seen.operands:
        names = {parameter.data_ptr(): name for name, parameter in module.named_parameters()}
        found = {names.get(operand.data_ptr(), "") for operand in seen.operands} - {""}
        raise InputError(_uncovered(sorted(found) or ["other operations"], precision))


_PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::linear", "aten::matmul"),
    *("aten::mv", "aten::addmv", "aten::dot", "aten::vdot", "aten::convolution", "aten::bilinear", "aten::_trilinear"),
    *("aten::_grouped_mm", "aten::_scaled_mm", "aten::mkldnn_linear", "mkldnn::_linear_pointwise"),
    *("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"),
}
"""Dispatcher names of the operations that multiply and add."""


class _HalfProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the operands of every product of half tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in _PRODUCTS:
            self.operands += [x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.itemsize < 4]
        return func(*args, **(kwargs or {}))


# -- sums


def linear_layers(module: nn.Module, head: nn.Module | None) -> list[nn.Linear | CpuLinear]:
    """Return the covered linear layers of a model, each once, without the LM head."""
    parts = (part for part in module.modules() if isinstance(part, nn.Linear | CpuLinear) and part is not head)
    return [part for part in parts if type(part) in (nn.Linear, CpuLinear)]


def described(layers: Sequence[nn.Linear | CpuLinear]) -> str:
    """Return the number of layers of each kind in words, for the contract."""
    return in_words("fp32" if _is_fp32(x) else "widened" if isinstance(x, CpuLinear) else "native" for x in layers)


LayerKind = Literal["widened", "native", "fp32"]
"""Kind of linear layer. `widened`: half operands widened to FP32, result rounded once. `native`: half products by the
processor. `fp32`: all FP32."""

_KINDS: dict[LayerKind, str] = {"widened": "widened to fp32", "native": "native", "fp32": "in fp32"}


def in_words(kinds: Iterable[LayerKind]) -> str:
    """Return the number of layers of each kind in words, for a side that has no modules."""
    counts = Counter(kinds)
    return ", ".join(f"{counts[kind]} {words}" for kind, words in _KINDS.items() if counts[kind]) or "none"


def _is_fp32(layer: nn.Linear | CpuLinear) -> bool:
    return layer.weight.dtype == torch.float32


def layers_sum(layers: Sequence[nn.Linear | CpuLinear]) -> str:
    """Return the format of the sums in a model's layers, forward and backward, for the contract.

    One layer of each kind and shape is run.
    """
    kinds = {(type(x), x.weight.shape, x.weight.dtype, x.bias is None): x for x in reversed(layers)}
    return sums_in_words([_sums_in_fp32(layer) for layer in kinds.values()])


def sums_in_words(exact: Sequence[bool]) -> str:
    """Return `fp32` if all products have FP32 sums, `less than fp32` if one does not, `none` without products."""
    return "none" if not exact else "fp32" if all(exact) else "less than fp32"


_ROWS, _RESULTS = 64, 256
"""Rows of a test product, and its maximum number of columns. Its sums have as many terms as the layer's."""


def sums_in_fp32(multiply: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> bool:
    """Return whether `multiply(x, weight)`, which computes `x @ weight^T`, sums in FP32.

    Args:
        multiply: is called with operands of the dtype of `weight`; its result may have any dtype.
        weight: [out, in]; only its shape, dtype and device are used.
    """
    outputs, inputs = weight.shape
    return _exact(multiply(_ones(_ROWS, inputs, weight), _terms(min(outputs, _RESULTS), inputs, weight)), weight)


def _sums_in_fp32(layer: nn.Linear | CpuLinear) -> bool:
    """Return whether the layer sums in FP32 in its results and in its gradients of inputs and of weights.

    It is run with weights and inputs that make each of these a sum of `_terms`.
    """
    weight = layer.weight.detach()
    outputs, inputs = weight.shape
    few_outputs, few_inputs = min(outputs, _RESULTS), min(inputs, _RESULTS)
    rows, columns = _ones(_ROWS, few_inputs, weight), _terms(few_inputs, outputs, weight).t()
    x, other = _terms(few_inputs, _ROWS, weight).t(), _ones(few_outputs, few_inputs, weight)
    return (
        sums_in_fp32(lambda x, w: _pass(layer, x, w)[0], weight)
        and _exact(_pass(layer, rows, columns)[1], weight)
        and _exact(_pass(layer, x, other)[2], weight)
    )


@torch.enable_grad()
def _pass(layer: nn.Linear | CpuLinear, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and the gradients of x and weight for a gradient of 1 in every result."""
    x, weight = (t.contiguous().requires_grad_() for t in (x, weight))
    others = {} if layer.bias is None else {"bias": torch.zeros_like(weight[:, 0])}
    out: Tensor = functional_call(layer, {"weight": weight, **others}, (x,))
    of_x, of_weight = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    return out.detach(), of_x, of_weight


_FEWEST = 3
"""Smallest number of terms with which a sum can show its format."""


def _ones(rows: int, width: int, like: Tensor) -> Tensor:
    return torch.ones(rows, max(width, _FEWEST), dtype=like.dtype, device=like.device)


def _terms(rows: int, width: int, like: Tensor) -> Tensor:
    """Return rows whose sums need FP32: a large number, its negative and a small one at random places among zeros.

    The small number is the exact sum in any order. A sum of fewer bits loses it where it is added to one of the large
    numbers, which happens in some rows whether sums run in order, in lanes or in blocks. It also changes when FP32
    operands are rounded.
    """
    shape = rows, max(width, _FEWEST)
    places = torch.rand(shape, generator=torch.Generator().manual_seed(0)).topk(_FEWEST, dim=1).indices
    large, small = _large_and_small(like)
    values = torch.tensor([large, small, -large]).expand_as(places)
    return torch.zeros(shape).scatter(1, places, values).to(like.device, like.dtype)


def _large_and_small(like: Tensor) -> tuple[float, float]:
    """Return the numbers of `_terms`; their sum needs 16 significand bits for half operands and all 24 for FP32."""
    return (2.0**12, 1 + 2.0**-11) if like.dtype == torch.float32 else (2.0**15, 1.0)


def _exact(sums: Tensor, like: Tensor) -> bool:
    return bool((sums.float() == _large_and_small(like)[1]).all())
