"""Check that the precision rules cover a model's linear operations, and test whether those sum in FP32.

The rules are written for `nn.Linear`, `nn.Embedding`, and the routers and experts of `precision.experts`. Weights used
in any other way (a subclass, a Conv1D, experts of another layout, `F.linear` on another module's weight) would silently
round and sum by other rules. Structure shows most of them before anything runs, and a short forward pass the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from betterhalf.errors import InputError
from betterhalf.precision.covered_products import half_products, uncovered_products
from betterhalf.precision.cpu_embedding import CpuEmbedding, has_rule
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.experts import Experts, Projection, Router
from betterhalf.precision.roles import Precision

# -- coverage


def require_covered(module: nn.Module, precision: Precision) -> None:
    """Refuse weights outside the layers that have a precision rule; FP32 needs no rule and passes.

    Call it after `use_cpu_linear`, `use_cpu_embedding` and `use_experts` have replaced their layers. FSDP2 changes the
    classes of modules, so call it before that.

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
    if has_rule(part):
        return precision.device.type != "cpu" or part.weight.dtype == torch.float32
    return type(part) in _LAYERS


_LAYERS = (nn.Linear, nn.Embedding, CpuLinear, CpuEmbedding, Router, Experts)
"""Layers with a precision rule."""


def _uncovered(names: Sequence[str], precision: Precision) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the precision rules of {precision.roles.compute_dtype} cover nn.Linear and nn.Embedding, but the model also "
        f"multiplies by weights in {shown}; train it with precision=fp32, or use a model such as llama, mistral, "
        "qwen2 or qwen3"
    )


def require_covered_products(module: nn.Module, precision: Precision, run: Callable[[], object]) -> None:
    """Refuse a model that multiplies by parameters outside its covered layers; FP32 needs no rule and passes.

    Where products must have FP32 sums on a CPU, any product of half tensors is refused as well.

    Args:
        module: model; the message names its parameters.
        precision: of the run.
        run: performs a forward pass of `module`.

    Raises:
        InputError: a product is not covered; the message names the parameters among its operands.
    """
    compute = precision.roles.compute_dtype
    if compute == "fp32":
        return
    found = uncovered_products(module, lambda part: type(part) in _LAYERS or has_rule(part), run)
    if found:
        raise InputError(_uncovered(found, precision))
    if precision.fp32_sums(compute) and (operands := half_products(run)):
        names = {parameter.data_ptr(): name for name, parameter in module.named_parameters()}
        known = {names.get(operand.data_ptr(), "") for operand in operands} - {""}
        raise InputError(_uncovered(sorted(known) or ["other operations"], precision))


# -- sums


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayer:
    """A covered linear layer, and the dtype in which it computes."""

    layer: nn.Linear | CpuLinear | Projection
    dtype: torch.dtype
    """Dtype of its weight in a pass; a sharded weight has another one between passes."""

    @property
    def kind(self) -> LayerKind:
        """Kind of its products."""
        if self.dtype == torch.float32:
            return "fp32"
        widened = self.layer.widens if isinstance(self.layer, Projection) else isinstance(self.layer, CpuLinear)
        return "widened" if widened else "native"


def linear_layers(module: nn.Module, head: nn.Module | None) -> dict[str, nn.Linear | CpuLinear]:
    """Return name -> covered linear layer of a model, each once, without the LM head; see `require_covered`."""
    kinds = (nn.Linear, CpuLinear)
    return {name: part for name, part in module.named_modules() if type(part) in kinds and part is not head}


def expert_layers(module: nn.Module, computing_dtype: Callable[[str], torch.dtype]) -> list[LinearLayer]:
    """Return every matrix of a model's routers and experts as a linear layer, which no `linear_layers` holds.

    Args:
        module: model.
        computing_dtype: name of a parameter -> its dtype in a pass.
    """
    return [
        LinearLayer(layer=matrix, dtype=torch.float32 if matrix.always_fp32 else computing_dtype(f"{path}.{name}"))
        for path, part in module.named_modules()
        if isinstance(part, Router | Experts)
        for name, matrices in part.projections().items()
        for matrix in matrices
    ]


def described(layers: Sequence[LinearLayer]) -> str:
    """Return the number of layers of each kind in words, for the contract."""
    return in_words(layer.kind for layer in layers)


LayerKind = Literal["widened", "native", "fp32"]
"""Kind of linear layer. `widened`: half operands widened to FP32, result rounded once. `native`: half products by the
processor. `fp32`: all FP32."""

_KINDS: dict[LayerKind, str] = {"widened": "widened to fp32", "native": "native", "fp32": "in fp32"}


def in_words(kinds: Iterable[LayerKind]) -> str:
    """Return the number of layers of each kind in words, for a side that has no modules."""
    counts = Counter(kinds)
    return ", ".join(f"{counts[kind]} {words}" for kind, words in _KINDS.items() if counts[kind]) or "none"


def layers_sum(layers: Sequence[LinearLayer]) -> str:
    """Return the format of the sums in a model's layers, forward and backward, for the contract.

    One layer of each kind and shape is run.
    """
    kinds = {(type(x.layer), x.layer.weight.shape, x.dtype, x.layer.bias is None): x for x in reversed(layers)}
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


def _sums_in_fp32(found: LinearLayer) -> bool:
    """Return whether the layer sums in FP32 in its results and in its gradients of inputs and of weights.

    It is run with weights and inputs that make each of these a sum of `_terms`.
    """
    layer = found.layer
    weight = torch.empty(layer.weight.shape, dtype=found.dtype, device=layer.weight.device)
    outputs, inputs = weight.shape
    few_outputs, few_inputs = (max(_FEWEST, min(size, _RESULTS)) for size in (outputs, inputs))
    rows, columns = _ones(_ROWS, few_inputs, weight), _terms(few_inputs, outputs, weight).t()
    x, other = _terms(few_inputs, _ROWS, weight).t(), _ones(few_outputs, few_inputs, weight)
    return (
        sums_in_fp32(lambda x, w: _pass(layer, x, w)[0], weight)
        and _exact(_pass(layer, rows, columns)[1], weight)
        and _exact(_pass(layer, x, other)[2], weight)
    )


@torch.enable_grad()
def _pass(layer: nn.Linear | CpuLinear | Projection, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
