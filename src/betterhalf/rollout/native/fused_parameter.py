"""Storage of the decoder's weights: parameters concatenated in one tensor, addressed by their Hugging Face names.

On a CPU a projection exists only in packed form, for `precision.products.product`, so a digest reads what the products
use. Everything else is a plain tensor that never moves, because CUDA graphs keep its pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from betterhalf.precision.products import packed, unpacked

Operand = Tensor | tuple[Tensor, ...]
"""Right side of a product: one tensor, or one for each parameter, whose results are concatenated."""


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
        """Allocate.

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
        self._pieces = self._cut(torch.zeros(self._shape, dtype=dtype, device=device))

    def _cut(self, whole: Tensor) -> tuple[Tensor, ...]:
        return tuple(whole[rows] for rows in self._rows.values()) if self._apart else (whole,)

    @property
    def tensor(self) -> Tensor:
        """The tensor as products read it, unless its parameters are apart."""
        (whole,) = self._pieces
        return whole

    @property
    def operand(self) -> Operand:
        """The right side of products."""
        return self._pieces if self._apart else self.tensor

    @property
    def operands(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Names of the parameters that share a product, and its right side, for each product."""
        groups = [(name,) for name in self._rows] if self._apart else [self.names]
        return zip(groups, self._pieces, strict=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its parameters, in order."""
        return tuple(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one parameter."""
        rows = self._rows[name]
        return (rows.stop - rows.start, *self._shape[1:])

    def begin(self) -> None:
        """Start writing all parameters, and discard those written in an attempt that did not complete."""
        self._arriving, self._awaited = None, set(self._rows)

    def write(self, name: str, values: Tensor) -> None:
        """Write one parameter; a packed tensor changes only when the last of its parameters has been written."""
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

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Return (name, values) of each parameter: views, or copies if the tensor is packed."""
        if self._apart:
            return ((name, unpacked(piece)) for name, piece in zip(self._rows, self._pieces, strict=True))
        plain = unpacked(self.tensor)
        return ((name, plain[rows]) for name, rows in self._rows.items())
