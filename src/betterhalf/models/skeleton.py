"""transformers modules whose parameters have names and shapes, but no storage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def skeleton(hf_config: Any) -> Any:
    """Return the transformers module with FP32 parameters and buffers on the meta device.

    Args:
        hf_config: transformers configuration of a decoder.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)  # type: ignore[no-untyped-call]


def compute_buffers(module: Any) -> tuple[str, ...]:
    """Give the buffers of a skeleton storage on the CPU, and compute them, such as rope's inverse frequencies.

    transformers computes them here as it does in `from_pretrained` after it has read the weights.

    Returns:
        Names of the buffers that it could not compute: they belong to the files. Their content is arbitrary.
    """
    for part, name, buffer in _buffers(module):
        part._buffers[name] = _marked(buffer)
        part._is_hf_initialized = False  # else transformers would take them for computed
    module.initialize_weights()  # leaves parameters on the meta device as they are
    return tuple(name for name, buffer in module.named_buffers() if not _computed(buffer))


def _buffers(module: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    for part in list(module.modules()):
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                yield part, name, buffer


def _marked(buffer: Tensor) -> Tensor:
    """Return CPU storage for a buffer, filled with NaN if it can hold it."""
    return torch.full_like(buffer, math.nan if buffer.is_floating_point() else 0, device="cpu")


def _computed(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and not bool(buffer.isnan().any())


def to_device(module: Any, device: torch.device) -> Any:
    """Move a module to the device, in place; tensors without storage stay as they are.

    Args:
        module: loaded module, or a skeleton.
        device: of the computation.

    Returns:
        The same module.
    """
    return module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
