"""Storage of the decoder's weights: parameters that lie end to end in one tensor, under their Hugging Face names.

A projection on a CPU is held packed for `precision.products.product`, and nowhere else, so a digest reads what the
products use. Everything else is a plain tensor that never moves, because CUDA graphs keep its pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from betterhalf.precision.products import packed, unpacked


class FusedParameter:
    """One tensor [rows, ...] made of one parameter or more; zero until they are written."""

    def __init__(
        self, parts: Mapping[str, int], width: int | None, *, dtype: torch.dtype, device: torch.device, packs: bool
    ) -> None:
        """Allocate.

        Args:
            parts: rows of each parameter by name, in order.
            width: columns; None for vectors.
            dtype: of the tensor.
            device: where it lies.
            packs: it is the right side of products on a CPU and of nothing else.
        """
        stops = list(accumulate(parts.values()))
        self._rows = {name: slice(stop - rows, stop) for (name, rows), stop in zip(parts.items(), stops, strict=True)}
        self._packs = packs
        self._arriving: Tensor | None = None
        self._awaited: set[str] = set()
        self.tensor = torch.zeros((stops[-1],) if width is None else (stops[-1], width), dtype=dtype, device=device)
        """As computed with."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters, in order."""
        return tuple(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one parameter."""
        rows = self._rows[name]
        return (rows.stop - rows.start, *self.tensor.shape[1:])

    def begin(self) -> None:
        """All parameters are about to be written; what was written of an earlier attempt is forgotten."""
        self._arriving, self._awaited = None, set(self._rows)

    def write(self, name: str, values: Tensor) -> None:
        """Put one parameter in place; a packed block changes when the last of its parameters has arrived."""
        if not self._packs:
            self.tensor[self._rows[name]].copy_(values)
            return
        if self._arriving is None:
            self._arriving = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device=self.tensor.device)
        self._arriving[self._rows[name]].copy_(values)
        self._awaited.discard(name)
        if not self._awaited:
            self.tensor, self._arriving = packed(self._arriving), None

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter as held: a view, or, of a packed tensor, a copy."""
        plain = unpacked(self.tensor)
        return ((name, plain[rows]) for name, rows in self._rows.items())
