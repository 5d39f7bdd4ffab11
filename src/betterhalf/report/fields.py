"""Reading JSON that may be half there: what is missing or of another kind comes back as nothing, never as an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Point = tuple[float, float]


_LARGEST = 1e100
"""Nothing a run measures is as large; up to here, squares and sums stay finite."""


def number(value: object) -> float:
    """`value` as a float; NaN when it is no number (a boolean is none), or too large to be a measurement."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        return math.nan
    return float(value)


def mapping(tree: object, key: str) -> Mapping[str, Any]:
    """The object at `key`; empty when there is none."""
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def mappings(tree: object, key: str) -> list[Mapping[str, Any]]:
    """The objects in the list at `key`; empty when there is none."""
    return [item for item in _list(tree, key) if isinstance(item, Mapping)]


def texts(tree: object, key: str) -> list[str]:
    """The entries of the list at `key`, as text."""
    return [str(item) for item in _list(tree, key)]


def points(tree: object, key: str) -> list[Point]:
    """The pairs of finite numbers in the list at `key`; what is no such pair is left out."""
    pairs = [item for item in _list(tree, key) if isinstance(item, (list, tuple)) and len(item) == 2]
    both = [(number(x), number(y)) for x, y in pairs]
    return [(x, y) for x, y in both if math.isfinite(x) and math.isfinite(y)]


def _list(tree: object, key: str) -> list[Any]:
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return list(value) if isinstance(value, (list, tuple)) else []
