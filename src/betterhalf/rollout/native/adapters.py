"""LoRA adapters that the native engine serves unmerged, beside the projections that they adapt.

Results are rounded where the trainer rounds them: `A x`, `B (A x)`, the scaled product, and its sum with the base's
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.config.schema import LoraConfig
from betterhalf.models.adapters import is_target
from betterhalf.rollout.native.rounding import Rounding

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Adapter of one of the parameters of a projection."""

    name: str
    """Name of the parameter."""
    rows: slice
    """Its rows in the projection's result."""
    down: Tensor
    """A [rank, in], in the dtype of products."""
    up: Tensor
    """B [rows, rank]."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the engine, tensor): A, then B."""
        layer = self.name.removesuffix(_WEIGHT)
        yield from ((f"{layer}{_DOWN}", self.down), (f"{layer}{_UP}", self.up))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Adapters of one projection."""

    each: tuple[Adapter, ...]
    scale: float
    """Factor of their products."""

    def add(self, rounding: Rounding, x: Tensor, base: Tensor, project: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the projection's result with those of the adapters added.

        Args:
            rounding: rounding of the projection.
            x: rows [T, in].
            base: result without adapters [T, out], rounded.
            project: (rows [T, in], matrix [out, in]) -> rounded product [T, out].
        """
        out = base.clone()
        for adapter in self.each:
            product = project(project(x, adapter.down), adapter.up)
            scaled = rounding.round(product * self.scale)
            out[:, adapter.rows] = rounding.round(base[:, adapter.rows] + scaled)
        return out


def zero_adapters(
    parts: dict[str, slice], width: int, lora: LoraConfig, dtype: torch.dtype, device: torch.device
) -> Adapters | None:
    """Return zero-initialised adapters of a projection; None if none of its parameters is a target.

    Args:
        parts: name of each parameter -> its rows.
        width: columns of the projection.
        lora: rank, scale and targets.
        dtype: dtype of the projection's products.
        device: device of the tensors.
    """
    each = tuple(
        Adapter(
            name=name,
            rows=rows,
            down=torch.zeros(lora.rank, width, dtype=dtype, device=device),
            up=torch.zeros(rows.stop - rows.start, lora.rank, dtype=dtype, device=device),
        )
        for name, rows in parts.items()
        if is_target(name.removesuffix(_WEIGHT), lora)
    )
    return Adapters(each=each, scale=lora.scale) if each else None
