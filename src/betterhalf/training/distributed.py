"""Reductions over the ranks of a trainer; here there is one rank, and a trainer of several brings its own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Collective(Protocol):
    """The ranks of one trainer, which call the same methods in the same order.

    When an optimizer step begins, each rank holds a shard: entries of the FP32 masters that no other rank holds, and
    the gradient of the whole batch for them, already reduced over the ranks' micro-batches. All shards together are
    the model. Ranks may also be replicas, which hold the same entries and, after that reduction, the same gradient:
    then each entry counts once, so `sum_` adds up the shards of one replica, and with whole replicas does nothing.
    """

    def max_(self, values: Tensor) -> None:
        """Replace `values` by their maximum over all ranks, so that all skip an optimizer step or none does."""
        ...

    def sum_(self, values: Tensor) -> None:
        """Replace `values` by their sum over the shards, in an order that gives all ranks the same bits.

        They are float64: the square of the gradient's norm, by which all ranks clip alike, and counts of entries.
        """
        ...


class SingleProcess:
    """A trainer in one process."""

    def max_(self, values: Tensor) -> None:
        """Nothing to do: the maximum over one rank."""

    def sum_(self, values: Tensor) -> None:
        """Nothing to do: the sum over one shard."""
