"""Sources from which a rank reads its rows of the model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from betterhalf.distributed.shard_range import ShardRange


class RowSource(Protocol):
    """Values of all parameters of a model, of which a rank reads its own rows."""

    def rows(self, wanted: Mapping[str, ShardRange]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, rows of this rank), each parameter once, one tensor at a time.

        A source may be collective: every rank reads it to its end, with the same names in the same order.

        Args:
            wanted: name -> rows of this rank, for every parameter of the module.

        Yields:
            Tensors [count, ...] in the dtype of the source, on any device; copying them into FP32 is exact.

        Raises:
            BetterhalfError: a file cannot be read, or holds another model.
        """
        ...


class Zeros:
    """Weights that are all 0, for a trainer that then loads a checkpoint; implements `RowSource`."""

    def rows(self, wanted: Mapping[str, ShardRange]) -> Iterator[tuple[str, Tensor]]:
        """See `RowSource.rows`."""
        for name, rows in wanted.items():
            yield name, torch.zeros(()).expand(rows.count, *rows.shape[1:])
