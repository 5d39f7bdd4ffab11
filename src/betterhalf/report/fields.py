"""Read JSON that may be incomplete: missing values and values of the wrong type give empty results, not errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Point = tuple[float, float]


_LARGEST = 1e100
"""Largest number that is accepted as a measurement; squares and sums of such numbers stay finite."""


def number(value: object) -> float:
    """Return `value` as a float; NaN if it is not a number (a boolean is not), or too large to be a measurement."""
    if type(value) is float and -_LARGEST <= value <= _LARGEST:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        return math.nan
    return float(value)


def finite(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the numbers at `key` in those rows that have one: infinity and NaN are null in the files."""
    return [value for row in rows if math.isfinite(value := number(row.get(key)))]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None if there are no values."""
    return math.fsum(values) / len(values) if values else None


def mapping(tree: object, key: str) -> Mapping[str, Any]:
    """Return the object at `key`; empty if there is none."""
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def mappings(tree: object, key: str) -> list[Mapping[str, Any]]:
    """Return the objects in the list at `key`; empty if there is none."""
    return [item for item in _list(tree, key) if isinstance(item, Mapping)]


def texts(tree: object, key: str) -> list[str]:
    """Return the entries of the list at `key`, as text."""
    return [str(item) for item in _list(tree, key)]


def points(tree: object, key: str) -> list[Point]:
    """Return the pairs of finite numbers in the list at `key`; anything else is left out."""
    pairs = [item for item in _list(tree, key) if isinstance(item, (list, tuple)) and len(item) == 2]
    both = [(number(x), number(y)) for x, y in pairs]
    return [(x, y) for x, y in both if math.isfinite(x) and math.isfinite(y)]


def _list(tree: object, key: str) -> list[Any]:
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return list(value) if isinstance(value, (list, tuple)) else []
