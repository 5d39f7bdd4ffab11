"""LoRA adapters that vLLM serves unmerged: their names and shapes, the folder they are sent in, and what vLLM holds.

vLLM multiplies B by the scale when it loads an adapter. Only scales that are powers of two leave B's bits unchanged, so
that its digest can be compared; others are refused.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betterhalf.config.schema import LoraConfig, VllmEngineConfig
from betterhalf.errors import ConfigError
from betterhalf.models.adapters import is_target, write_adapter
from betterhalf.rollout.vllm.transfer import Ask
from betterhalf.rollout.weight_arrivals import Shapes

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `max_lora_rank` that vLLM accepts."""
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Adapter that vLLM has loaded."""

    names: frozenset[str]
    """Names of its tensors."""
    rank: int
    scale: float
    """Factor by which vLLM has multiplied B."""


def check_served(lora: LoraConfig, config: VllmEngineConfig) -> None:
    """Refuse adapters that vLLM cannot serve, or whose weights could not be verified.

    Raises:
        ConfigError: the message says what to set.
    """
    if math.frexp(lora.scale)[0] != 0.5:
        raise ConfigError(
            f"lora.merge=adapter with engine=vllm needs a scale that is a power of two, because vLLM multiplies B by "
            f"it, and alpha / rank is {lora.scale:g}; set lora.alpha={2 * lora.rank} and leave out "
            "lora.rank_stabilised, or set lora.merge=weights"
        )
    if lora.rank > _RANKS[-1]:
        raise ConfigError(f"vLLM serves adapters of rank {_RANKS[-1]} at most; lower lora.rank, or set engine=native")
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            "lora.merge=adapter reads adapters back from one GPU; set engine.tensor_parallel_size=1, or "
            "lora.merge=weights"
        )


def llm_options(lora: LoraConfig) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.LLM` that make room for one adapter."""
    room = next(rank for rank in _RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def adapter_shapes(shapes: Shapes, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of each adapter's tensors, given those of the model's weights."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) == 2 and ".layers." in name and is_target(layer, lora):
            found[f"{layer}{_DOWN}"] = (lora.rank, shape[1])
            found[f"{layer}{_UP}"] = (shape[0], lora.rank)
    return found


def send_adapter(ask: Ask, tensors: dict[str, Tensor], lora: LoraConfig) -> None:
    """Send an adapter through a temporary folder in PEFT's format; vLLM keeps its own copy."""
    with tempfile.TemporaryDirectory(prefix="betterhalf-adapter-") as folder:
        targets = {name.partition(".lora_")[0] for name in tensors}
        write_adapter(Path(folder), tensors, lora, targets, base="")
        served = Served(names=frozenset(tensors), rank=lora.rank, scale=lora.scale)
        ask("load_adapter", path=folder, served=served)


@torch.no_grad()
def held_adapters(model: Any, served: Served) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the one adapter that vLLM's model computes with; B is divided by the scale."""
    for path, layer in model.named_modules():
        if "lora_a_stacked" not in vars(layer) or ".layers." not in path:
            continue
        parent, _, leaf = path.rpartition(".")
        names = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
        for name, down, up in zip(names, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            if f"{parent}.{name}{_UP}" in served.names:
                yield f"{parent}.{name}{_DOWN}", down[0, 0, : served.rank]
                yield f"{parent}.{name}{_UP}", up[0, 0, :, : served.rank] / served.scale
