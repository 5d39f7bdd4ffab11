"""Numbers behind the figures: thinned and smoothed series, least-squares lines, ranges of axes, labels moved apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from betterhalf.report.fields import Point

Scale = Literal["linear", "log10", "log2"]
"""Mapping of values to distance along an axis."""

_POINTS_PER_FIGURE = 2000
_FEWEST, _MOST = 200, 1000
"""Bounds of the points of a line that a page holds; longer lines are thinned to their extremes."""

_TINY = 1e-300
_SUPERSCRIPTS = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")


def can_draw(scale: Scale, value: float) -> bool:
    """Return whether `value` can be drawn on an axis with this scale."""
    return math.isfinite(value) and (scale == "linear" or value > _TINY)


def points_of_line(lines: int) -> int:
    """Return the most points of each line of a figure."""
    return min(_MOST, max(_FEWEST, _POINTS_PER_FIGURE // max(1, lines)))


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """Reduce to about `limit` points that keep every visible extreme: lowest and highest of each bucket, in order.

    A NaN breaks the line, so a bucket of NaN alone keeps one of them.
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [point for point in bucket if math.isfinite(point[1])] or bucket[:1]
        kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
    return kept


def smoothing_window(count: int) -> int:
    """Return an odd window of about a twelfth of `count` values; 1 (no smoothing) for short runs."""
    return 1 if count < 15 else 2 * (count // 24) + 3


def smoothed(values: Sequence[float], window: int, scale: Scale = "linear") -> list[float]:
    """Return the means of the values that can be drawn, in a centred window that is shorter at the ends.

    They are geometric on a logarithmic axis, to damp lone spikes; NaN where the value is missing.
    """
    known = np.array([can_draw(scale, value) for value in values], dtype=bool)
    filled = np.where(known, values, 1.0)
    found = np.where(known, filled if scale == "linear" else np.log(filled), 0.0)
    sums, counts = (np.convolve(each, np.ones(window), "same") for each in (found, known))
    means = sums / np.maximum(counts, 1)
    return [float(mean) for mean in np.where(known, means if scale == "linear" else np.exp(means), math.nan)]


def least_squares(points: Sequence[Point]) -> tuple[float, float]:
    """Return slope and intercept of y on x: through the origin if all x are equal, NaN without points or at x = 0."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(set(xs)) > 1:
        line = statistics.linear_regression(xs, ys)
        return line.slope, line.intercept
    return (statistics.fmean(ys) / xs[0], 0.0) if any(xs) else (math.nan, math.nan)


def extent(
    values: Iterable[float], scale: Scale, include: Iterable[float] = (), bounds: Iterable[float | None] = ()
) -> tuple[float, float] | None:
    """Return the range that an axis must show: the drawable values and `include`; None without a drawable value.

    Values that are all equal get a range around them: up to the `bounds` of a healthy run where there are any, so that
    a line of zeros is drawn on an axis that means something.
    """
    drawable = [value for value in values if can_draw(scale, value)]
    if not drawable:
        return None
    drawable += include
    low, high = min(drawable), max(drawable)
    if low < high:
        return low, high
    near = [bound for bound in bounds if bound is not None and bound != low and scale == "linear"]
    if scale != "linear":
        near = [low / 2, high * 2]
    elif not near:
        near = [0.9 * low, 1.1 * low] if low else [1.0]
    return min(low, *near), max(high, *near)


def share(scale: Scale, value: float, ends: tuple[float, float]) -> float:
    """Return the place of a value between the ends of the axis, from 0 to 1."""
    low, high, at = (value if scale == "linear" else math.log(value) for value in (*ends, value))
    return (at - low) / (high - low)


def value_at(scale: Scale, place: float, ends: tuple[float, float]) -> float:
    """Return the value at a share of the axis."""
    low, high = ends
    return low + place * (high - low) if scale == "linear" else low * (high / low) ** place


def spread(positions: Sequence[float], gap: float, high: float) -> list[float]:
    """Move `positions` until they are `gap` apart and at most `high`; their order is kept."""
    order, gaps = np.argsort(positions, kind="stable"), gap * np.arange(len(positions))
    apart = np.maximum.accumulate(np.asarray(positions)[order] - gaps)
    placed = np.empty(len(positions))
    placed[order] = np.minimum(apart, high - gaps[-1:]) + gaps
    return [float(place) for place in placed]


def superscript(exponent: int) -> str:
    """Return an exponent, such as -8, in superscript characters."""
    return str(exponent).translate(_SUPERSCRIPTS)
