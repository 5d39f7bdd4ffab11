"""What several trainer processes must agree on; here there is one, and a sharded trainer brings its own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Collective(Protocol):
    """The ranks of one trainer."""

    def max_(self, values: Tensor) -> None:
        """Replace `values` by their maximum over the ranks, so that all skip an optimizer step or none does."""
        ...


class SingleProcess:
    """A trainer in one process."""

    def max_(self, values: Tensor) -> None:
        """Nothing to do: the maximum over one rank."""
