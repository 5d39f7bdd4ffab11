"""What several trainer processes must agree on. One process agrees with itself; a sharded trainer takes its place here."""

from __future__ import annotations

from typing import Protocol


class Collective(Protocol):
    """The ranks of one trainer."""

    rank: int
    world_size: int

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one: all ranks skip an optimizer step, or none does."""
        ...


class SingleProcess:
    """A trainer in one process."""

    rank = 0
    world_size = 1

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag
