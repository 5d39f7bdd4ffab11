"""Rows of one tensor that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRange:
    """Part of one tensor that a rank holds: rows of its first axis."""

    first: int
    """Index of the first row."""
    count: int
    """Number of rows; 0 on the last ranks if the rows run out before them, as with 5 rows on 4 ranks."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""

    @property
    def rows(self) -> slice:
        """Rows as an index of the whole tensor."""
        return slice(self.first, self.first + self.count)
