"""Mixtures of experts in vLLM: their weights under Hugging Face names, and routers in FP32.

vLLM keeps the experts of a layer in two fused parameters, and on a CPU reorders those for its grouped kernel. It
computes the router in the model's dtype; this module makes it compute in FP32, as the trainer does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LAYER, _ROUTER = "RoutedExperts", "GateLinear"
"""Classes of vLLM, by name, that hold experts and routers."""


def is_experts(layer: Any) -> bool:
    """Return whether a module of vLLM holds the experts of a layer."""
    return any(base.__name__ == _LAYER for base in type(layer).__mro__)


def routers(model: Any) -> list[Any]:
    """Return the router layers of a model, in order."""
    return [part for part in model.modules() if any(base.__name__ == _ROUTER for base in type(part).__mro__)]


def _sizes(layer: Any) -> tuple[int, int, int]:
    """Return experts, width of an expert on this rank without padding, and hidden size."""
    config = layer.moe_config
    return int(layer.w2_weight.shape[0]), int(config.intermediate_size_per_partition), int(config.hidden_dim)


def expert_shapes(path: str, layer: Any) -> dict[str, tuple[int, ...]]:
    """Return Hugging Face name -> shape over all ranks of the experts of a layer at `path`."""
    count, width, hidden = _sizes(layer)
    whole = width * _ranks(layer)
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(count):
        name = f"{_block(path)}.experts.{expert}"
        shapes |= {f"{name}.{part}_proj.weight": (whole, hidden) for part in ("gate", "up")}
        shapes[f"{name}.down_proj.weight"] = (hidden, whole)
    return shapes


def held_experts(
    path: str, layer: Any, of_ranks: Callable[[int, Tensor], list[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, matrix as the kernel multiplies by it) of the experts of a layer at `path`.

    Args:
        path: path of the layer in the model.
        layer: module with `w13_weight` [E, 2 I, H] and `w2_weight` [E, H, I], in the kernel's order.
        of_ranks: (number of ranks, tensor of this rank) -> tensor of each rank.
    """
    count, width, _ = _sizes(layer)
    gate_up, down = (_in_order(layer, getattr(layer, name).detach()) for name in ("w13_weight", "w2_weight"))
    padded = gate_up.shape[1] // 2
    for expert in range(count):
        name = f"{_block(path)}.experts.{expert}"
        for part, start in (("gate", 0), ("up", padded)):
            rows = gate_up[expert, start : start + width]
            yield f"{name}.{part}_proj.weight", torch.cat(of_ranks(_ranks(layer), rows.contiguous()))
        columns = down[expert, :, :width].contiguous()
        yield f"{name}.down_proj.weight", torch.cat(of_ranks(_ranks(layer), columns), dim=1)


def _block(path: str) -> str:
    """Return the name of the block of experts: `model.layers.0.mlp` of `model.layers.0.mlp.experts.routed_experts`."""
    return path.partition(".experts")[0]


def _ranks(layer: Any) -> int:
    return int(layer.moe_config.moe_parallel_config.tp_size)


# -- memory order of the CPU kernel


def _instructions(layer: Any) -> str | None:
    """Return the instruction set for which the CPU kernel reorders weights; None for a kernel with plain weights."""
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is None or getattr(experts, "_use_zentorch", True):
        return None
    return str(experts.isa)


def pack(model: Any, names: Collection[str] | None) -> None:
    """Reorder the experts' weights for the CPU kernel after a reload.

    vLLM does so only after the first load; a reload copies plain weights to where the kernel expects reordered ones.

    Args:
        model: vLLM's model.
        names: weights that were loaded; None for all. Experts that were not loaded still have the kernel's order.
    """
    for path, layer in model.named_modules():
        block = f"{_block(path)}.experts."
        arrived = names is None or any(name.startswith(block) for name in names)
        if arrived and is_experts(layer) and _instructions(layer) is not None:
            layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def _in_order(layer: Any, weight: Tensor) -> Tensor:
    """Return a kernel's weight [E, rows, columns] in the plain order of the model's files."""
    instructions = _instructions(layer)
    if instructions is None:
        return weight
    places = _places(int(weight.shape[1]), int(weight.shape[2]), weight.dtype, instructions)
    plain = torch.empty_like(weight).view(weight.shape[0], -1)
    plain[:, places] = weight.reshape(weight.shape[0], -1)
    return plain.view(weight.shape)


@cache
def _places(rows: int, columns: int, dtype: torch.dtype, instructions: str) -> Tensor:
    """Return the index in a plain matrix of each element of a reordered one, int64 [rows * columns].

    The kernel's own function reorders a matrix of indices, in two halves of 15 bits; it moves bits without computing.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    index = torch.arange(rows * columns)
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    halves: list[Tensor] = [
        cpu_prepack_moe_weight(part.to(kind).view(dtype).view(1, rows, columns), instructions).view(kind).flatten()
        for part in (index & 0x7FFF, index >> 15)
    ]
    low, high = halves
    return (high.long() << 15) | low.long()


# -- routers


def route_in_fp32(model: Any, read: Callable[[Any, str], Tensor]) -> None:
    """Make every router compute in FP32; call it again after each load.

    Args:
        model: vLLM's model.
        read: (layer, name of a parameter) -> the values that vLLM holds.
    """
    for router in routers(model):
        router.forward = _in_fp32(read(router, "weight").float(), returns_bias=router.return_bias)


def _in_fp32(weight: Tensor, *, returns_bias: bool) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        logits = functional.linear(x.float(), weight)
        return (logits, None) if returns_bias else logits

    return forward
