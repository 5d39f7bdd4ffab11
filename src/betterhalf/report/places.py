"""Places along an axis as shares of its length, for text that must not cover data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from betterhalf.report.numbers import Scale

_MARGIN = 0.05
_CANDIDATES = 9


def share(scale: Scale, value: float, ends: tuple[float, float]) -> float:
    """Return the place of `value` between the ends of the axis, from 0 to 1; values beyond are at the ends."""
    low, high, at = (value if scale == "linear" else math.log(value) for value in (*ends, value))
    return min(1.0, max(0.0, (at - low) / (high - low)))


def value_at(scale: Scale, place: float, ends: tuple[float, float]) -> float:
    """Return the value at a share of the axis."""
    low, high = ends
    return low + place * (high - low) if scale == "linear" else low * (high / low) ** place


def free_place(
    scale: Scale, band: tuple[float | None, float | None] | None, ends: tuple[float, float], taken: Sequence[float]
) -> float | None:
    """Return the value within the band that is furthest from the shares that data have `taken`; None without room."""
    if band is None or not taken:
        return None
    low, high = (share(scale, ends[i] if band[i] is None else _inside(scale, band[i]), ends) for i in (0, 1))
    low, high = low + _MARGIN, high - _MARGIN
    if high < low:
        return None
    places = [low + (high - low) * i / (_CANDIDATES - 1) for i in range(_CANDIDATES)]
    taken = sorted(set(taken))[:: max(1, len(set(taken)) // 500)]
    best = max(places, key=lambda place: min(abs(place - other) for other in taken))
    return value_at(scale, best, ends)


def _inside(scale: Scale, bound: float | None) -> float:
    """Return a bound of a band, or the smallest number that the scale has."""
    value = float(bound or 0.0)
    return value if scale == "linear" or value > 0 else 1e-300
