"""Storage of the decoder's weights: parameters concatenated in one tensor, addressed by their Hugging Face names.

On a CPU a projection exists only in packed form, for `precision.products.product`, so a digest reads what the products
use. Everything else is a plain tensor that never moves, because CUDA graphs keep its pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from betterhalf.config.schema import LoraConfig
from betterhalf.errors import EngineError
from betterhalf.precision.products import packed, unpacked
from betterhalf.rollout.native.adapters import Adapters, zero_adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """Right side of a product with LoRA adapters beside it."""

    weight: Tensor
    adapters: Adapters


Operand = Tensor | tuple[Tensor, ...] | Adapted
"""Right side of a product: one tensor, one for each parameter, whose results are concatenated, or one with adapters."""


class FusedParameter:
    """One tensor [rows, ...] made of one or more parameters; zero until they are written."""

    def __init__(
        self,
        parts: Mapping[str, int],
        width: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        packs: bool,
        apart: bool = False,
    ) -> None:
        """Allocate the tensor, filled with zeros.

        Args:
            parts: name -> rows of each parameter, in order.
            width: columns; None for vectors.
            dtype: dtype of the tensor.
            device: device of the tensor.
            packs: pack the tensor, which is then usable only as the right side of products on a CPU.
            apart: pack each parameter alone, so that its product has the same shape as the trainer's.
        """
        stops = list(accumulate(parts.values()))
        self._rows = {name: slice(stop - rows, stop) for (name, rows), stop in zip(parts.items(), stops, strict=True)}
        self._packs = packs
        self._apart = apart and len(parts) > 1
        self._arriving: Tensor | None = None
        self._awaited: set[str] = set()
        self._shape = (stops[-1],) if width is None else (stops[-1], width)
        self._dtype, self._device = dtype, device
        self._adapters: Adapters | None = None
        self._pieces = self._cut(torch.zeros(self._shape, dtype=dtype, device=device))

    def _cut(self, whole: Tensor) -> tuple[Tensor, ...]:
        return tuple(whole[rows] for rows in self._rows.values()) if self._apart else (whole,)

    @property
    def tensor(self) -> Tensor:
        """Tensor that products read; only for parameters that are not `apart`."""
        (whole,) = self._pieces
        return whole

    @property
    def operand(self) -> Operand:
        """The right side of products."""
        if self._adapters is not None:
            return Adapted(weight=self.tensor, adapters=self._adapters)
        return self._pieces if self._apart else self.tensor

    def adapt(self, lora: LoraConfig) -> None:
        """Add zero-initialised LoRA adapters to the parameters that are targets."""
        if len(self._shape) > 1:
            self._adapters = zero_adapters(self._rows, self._shape[1], lora, self._dtype, self._device)

    def _beside(self) -> dict[str, Tensor]:
        """Return name -> tensor of each adapter."""
        each = () if self._adapters is None else self._adapters.each
        return {name: tensor for adapter in each for name, tensor in adapter.tensors()}

    @property
    def operands(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Names of the parameters that share a product, and its right side, for each product."""
        groups = [(name,) for name in self._rows] if self._apart else [tuple(self._rows)]
        return zip(groups, self._pieces, strict=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its parameters, in order, and of their adapters."""
        return (*self._rows, *self._beside())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one parameter."""
        if name not in self._rows:
            return tuple(self._beside()[name].shape)
        rows = self._rows[name]
        return (rows.stop - rows.start, *self._shape[1:])

    def begin(self) -> None:
        """Start writing all parameters, and discard those written in an attempt that did not complete."""
        self._arriving, self._awaited = None, set(self._rows)

    def write(self, name: str, values: Tensor) -> None:
        """Write one parameter; a packed tensor changes only when the last of its parameters has been written."""
        if name not in self._rows:
            self._beside()[name].copy_(values)
            return
        if not self._packs:
            self.tensor[self._rows[name]].copy_(values)
            return
        if self._arriving is None:
            self._arriving = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._arriving[self._rows[name]].copy_(values)
        self._awaited.discard(name)
        if not self._awaited:
            self._pieces = tuple(packed(piece) for piece in self._cut(self._arriving))
            self._arriving = None

    def finish(self) -> None:
        """Require that all parameters of a packed tensor have arrived, or none.

        Raises:
            EngineError: some are missing.
        """
        if self._arriving is not None:
            raise EngineError(
                f"{min(self._awaited)!r} did not arrive with the parameters that the engine fuses with it; send all of "
                f"{', '.join(self._rows)}"
            )

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) of each parameter, as a view, or a copy if the tensor is packed; then the adapters."""
        if self._apart:
            yield from ((name, unpacked(piece)) for name, piece in zip(self._rows, self._pieces, strict=True))
        else:
            plain = unpacked(self.tensor)
            yield from ((name, plain[rows]) for name, rows in self._rows.items())
        yield from self._beside().items()
