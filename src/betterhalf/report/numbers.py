"""Numbers behind the figures: thinned and smoothed series, least-squares lines, ranges of axes, labels moved apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from betterhalf.report.fields import Point

Scale = Literal["linear", "log10", "log2"]
"""Mapping of values to distance along an axis."""

_POINTS_PER_FIGURE = 2400
_FEWEST, _MOST = 200, 1000
"""Bounds of the points of a line that a page holds; longer lines are thinned to their extremes."""

_TINY = 1e-300
_SUPERSCRIPTS = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")


def can_draw(scale: Scale, value: float) -> bool:
    """Return whether `value` can be drawn on an axis with this scale."""
    return math.isfinite(value) and (scale == "linear" or value > _TINY)


def points_of_line(lines: int) -> int:
    """Return the most points of each line of a figure, which keeps a page of long runs below 2 MB."""
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


def moving_average(values: Sequence[float], window: int, every: int = 1) -> list[float]:
    """Return the means of the finite values in a centred window, shorter at the ends, at each `every`-th value.

    NaN where the value is missing.
    """
    found = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(found)
    filled, half = np.where(finite, found, 0.0), window // 2
    means = []
    for index in range(0, len(found), every):
        near = slice(max(0, index - half), index + half + 1)
        means.append(float(filled[near].sum() / finite[near].sum()) if finite[index] else math.nan)
    return means


def smoothing_window(count: int) -> int:
    """Return an odd window of about a twelfth of `count` values; 1 (no smoothing) for short runs."""
    return 1 if count < 15 else 2 * (count // 24) + 3


def smoothed(steps: Sequence[float], values: Sequence[float], scale: Scale, limit: int) -> list[Point]:
    """Return points of the moving average, which is geometric on a logarithmic axis, to damp lone spikes."""
    every = math.ceil(2 * len(values) / limit) if len(values) > limit else 1
    window = smoothing_window(len(values))
    drawable = [value if can_draw(scale, value) else math.nan for value in values]
    if scale == "linear":
        means = moving_average(drawable, window, every)
    else:
        means = [math.exp(mean) for mean in moving_average([math.log(value) for value in drawable], window, every)]
    return list(zip(steps[::every], means, strict=True))


def least_squares(points: Sequence[Point]) -> tuple[float, float]:
    """Return slope and intercept of y on x: through the origin if all x are equal, NaN without points or at x = 0."""
    if not points:
        return math.nan, math.nan
    x_mean = math.fsum(x for x, _ in points) / len(points)
    y_mean = math.fsum(y for _, y in points) / len(points)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    if spread == 0.0:
        return (y_mean / x_mean, 0.0) if x_mean else (math.nan, math.nan)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    return slope, y_mean - slope * x_mean


def extent(
    values: Iterable[float], scale: Scale, include: Iterable[float] = (), bounds: Iterable[float] = ()
) -> tuple[float, float] | None:
    """Return the range that an axis must show: the drawable values and `include`; None without a drawable value.

    Values that are all equal get a range around them: up to the `bounds` of a healthy run where there are any, so that
    a line of zeros is drawn on an axis that means something.
    """
    drawable = [value for value in values if can_draw(scale, value)]
    if not drawable:
        return None
    low, high = min(*drawable, *include, drawable[0]), max(*drawable, *include, drawable[0])
    if low < high:
        return low, high
    near = [bound for bound in bounds if can_draw(scale, bound)]
    if scale != "linear":
        return low / 2, high * 2
    if any(bound != low for bound in near):
        return min(low, *near), max(high, *near)
    return (low, 1.0) if low == 0 else tuple(sorted((0.9 * low, 1.1 * low)))  # type: ignore[return-value]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move `positions` until they are `gap` apart within [low, high]; their order is kept."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    floor = low
    for index in order:
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def superscript(exponent: int) -> str:
    """Return an exponent, such as -8, in superscript characters."""
    return str(exponent).translate(_SUPERSCRIPTS)
