"""Collective operations over the ranks of one trainer.

A trainer in one process is one rank, `SingleProcess`; a trainer of several ranks has its own `Collective`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from betterhalf.reduction import declared_reductions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _Record = TypeVar("_Record", bound=DataclassInstance)
else:
    _Record = TypeVar("_Record")


class Collective(Protocol):
    """The ranks of one trainer, which call the same methods in the same order.

    When an optimizer step begins, each rank holds a shard: entries of the FP32 masters that no other rank holds, and
    the gradient of the whole batch for them, already reduced over the ranks' micro-batches. All shards together are
    the model. Ranks may also be replicas, which hold the same entries and, after that reduction, the same gradient.
    Each entry counts once: `sum_` adds the shards of one replica, and does nothing if each rank holds a whole replica.
    """

    @property
    def rank(self) -> int:
        """Rank of this process, from 0 to `world_size` - 1."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def max_(self, values: Tensor) -> None:
        """Replace `values`, float64 [N], by their elementwise maximum over all ranks."""
        ...

    def sum_(self, values: Tensor) -> None:
        """Replace `values`, float64 [N], by their sum over the shards, added in the same order on all ranks."""
        ...

    def gather(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the `values` of every rank, in rank order; [N], where N may differ between ranks."""
        ...


class SingleProcess:
    """The only rank of a trainer in one process."""

    rank = 0
    world_size = 1

    def max_(self, values: Tensor) -> None:
        """Leave `values` as they are: the maximum over one rank."""

    def sum_(self, values: Tensor) -> None:
        """Leave `values` as they are: the sum over one shard."""

    def gather(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the values of the one rank."""
        return (values,)


ONE_RANK = SingleProcess()
"""The collective of a trainer in one process; it has no state."""


def reduce_over_ranks(record: _Record, ranks: Collective, device: torch.device | None = None) -> _Record:
    """Reduce the numbers of a record over the ranks, each as its field declares (see `reduction`).

    Args:
        record: a frozen dataclass; fields without a reduction stay as they are on this rank.
        ranks: every rank makes the same call.
        device: device of the tensors that are reduced; the process group's backend must support it.

    Returns:
        The record with floats, in float64: exact for counts up to 2^53.
    """
    kinds = declared_reductions(type(record))
    sums = [name for name, kind in kinds.items() if kind in ("sum", "mean")]
    largest = [name for name, kind in kinds.items() if kind == "max"]
    # The number of ranks is summed too, for the means.
    summed = _values(record, sums, device, extra=1.0)
    ranks.sum_(summed)
    *totals, count = summed.tolist()
    values: dict[str, Any] = dict(zip(sums, totals, strict=True))
    values |= {name: values[name] / count for name in sums if kinds[name] == "mean"}
    if largest:
        maxima = _values(record, largest, device)
        ranks.max_(maxima)
        values |= dict(zip(largest, maxima.tolist(), strict=True))
    return replace(record, **values)


def _values(record: Any, names: list[str], device: torch.device | None, extra: float | None = None) -> Tensor:
    numbers = [float(getattr(record, name)) for name in names] + ([] if extra is None else [extra])
    return torch.tensor(numbers, dtype=torch.float64, device=device)
