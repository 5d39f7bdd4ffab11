"""Formats in which a model computes, read from its forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Formats seen while `generate` drew tokens."""

    compute: torch.dtype
    """Output of the first linear layer."""
    kv: torch.dtype
    """Cached keys."""


class ComputeWatch:
    """Format that a model's first linear layer returned in its latest forward pass."""

    def __init__(self, model: nn.Module) -> None:
        """Watch from now on, until `close`."""
        self._dtype: torch.dtype | None = None
        self._handle = _first_linear(model).register_forward_hook(self._note)

    def close(self) -> torch.dtype:
        """Stop watching, and return the format; there was a pass."""
        self._handle.remove()
        assert self._dtype is not None
        return self._dtype

    def _note(self, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._dtype = output.dtype


def _first_linear(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    return next(layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head)
