"""Charts of one quantity against another as inline SVG: clouds with their least-squares lines, and joined points.

The same drawing serves the scatter of pi against mu, log-ratio against length, bins and layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from betterhalf.report.axis import Axis, Scale, can_draw, fit
from betterhalf.report.canvas import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Band,
    Point,
    across_labels,
    band_area,
    band_label,
    cloud,
    grid,
    line_path,
    marker,
    rules,
    style_class,
    svg,
)

_MAX_MARKERS = 40
_WHOLE_TICKS = 8
_TICK_GAP = 34
"""Pixels that a label of the horizontal axis needs."""
_LABEL_WIDTH = 125
"""Pixels that the band's label takes at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one colour, dash and marker."""

    name: str
    """Full name, for the description."""
    style: int
    points: Sequence[Point]
    joined: bool = False
    """Draw a line with markers through the points, in order; else a cloud."""
    fit: tuple[float, float] | None = None
    """Slope and intercept of a straight line through the cloud."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure of one quantity (up) against another (across)."""

    key: str
    """Unique on the page; part of element ids."""
    title: str
    series: tuple[Series, ...]
    """Drawn in this order: the widest cloud first, lest it bury the others."""
    across_name: str
    """Written at the end of the horizontal axis."""
    scale: Scale = "linear"
    """Of the vertical axis."""
    include: tuple[float, ...] = ()
    """Values the vertical axis must reach."""
    across_range: tuple[float, float] | None = None
    """Ends of the horizontal axis; fitted to the points if absent."""
    across_include: tuple[float, ...] = ()
    """Values that a fitted horizontal axis must reach."""
    across_ticks: tuple[tuple[float, str], ...] | None = None
    """Places and texts on the horizontal axis; round numbers if absent."""
    band: Band | None = None
    """Healthy range, shaded."""
    wedge: Band | None = None
    """Healthy slopes of a line through the origin, in units up per unit across; shaded."""
    rules: tuple[tuple[float, str], ...] = ()
    """Horizontal lines with a short name each, which stands beside the plot."""
    guide: tuple[Point, Point] | None = None
    """A dashed line where every point lies when all is well."""


def draw_plot(plot: Plot) -> str | None:
    """The plot as an `<svg>` element, or None when no point can be drawn."""
    kept = [point for series in plot.series for point in _drawable(series, plot.scale)]
    axis = fit([y for _, y in kept], scale=plot.scale, start=BOTTOM, end=TOP, include=plot.include)
    if axis is None:
        return None
    across = _across(plot, [x for x, _ in kept])
    parts = [band_area(plot.band, axis), _wedge(plot.wedge, across, axis), grid(axis), _labels(plot, across)]
    parts.append(rules(axis, plot.rules, outside=True))
    parts += [_guide(plot.guide, across, axis)]
    lone = len(plot.series) == 1
    parts += [_series(series, across, axis, lone) for series in plot.series]
    parts += [band_label(plot.band, axis, _inked(plot, across, axis))]
    return svg(plot.key, plot.title, _description(plot), "".join(parts))


def whole_ticks(values: Iterable[int]) -> tuple[tuple[float, str], ...]:
    """Ticks at whole numbers, such as layers: about eight of the values, from the first on."""
    ordered = sorted(set(values))
    return tuple((float(value), str(value)) for value in ordered[:: max(1, math.ceil(len(ordered) / _WHOLE_TICKS))])


def least_squares(points: Sequence[Point]) -> tuple[float, float]:
    """Slope and intercept of y on x; through the origin where all x are equal, and NaN without points or at x = 0."""
    if not points:
        return math.nan, math.nan
    x_mean = math.fsum(x for x, _ in points) / len(points)
    y_mean = math.fsum(y for _, y in points) / len(points)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    if spread == 0.0:
        return (y_mean / x_mean, 0.0) if x_mean else (math.nan, math.nan)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    return slope, y_mean - slope * x_mean


def _drawable(series: Series, scale: Scale) -> list[Point]:
    return [(x, y) for x, y in series.points if math.isfinite(x) and can_draw(scale, y)]


def _inked(plot: Plot, across: Axis, axis: Axis) -> list[float]:
    """Heights, in pixels, that points and lines take up where the band's label may stand; of all points if none do."""
    heights, everywhere = [], []
    for series in plot.series:
        pixels = [(across.pixel(x), axis.pixel(y)) for x, y in _drawable(series, axis.scale)]
        everywhere += [y for _, y in pixels]
        between = (
            [_between(a, b, share / 8) for a, b in pairwise(pixels) for share in range(8)] if series.joined else []
        )
        heights += [y for x, y in (*pixels, *between) if x < LEFT + _LABEL_WIDTH]
    return heights or everywhere


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _across(plot: Plot, values: Sequence[float]) -> Axis:
    if plot.across_range is None:
        axis = fit(values, scale="linear", start=LEFT, end=RIGHT, include=plot.across_include)
        assert axis is not None  # the caller has at least one point, and its coordinates are finite
        return axis
    low, high = plot.across_range
    return Axis(scale="linear", low=low, high=high, start=LEFT, end=RIGHT)


def _labels(plot: Plot, across: Axis) -> str:
    ticks = plot.across_ticks
    if ticks is None:
        ticks = tuple((tick, across.label(tick)) for tick in across.ticks())
    placed = [(across.pixel(value), text) for value, text in ticks if across.low <= value <= across.high]
    return across_labels(_apart(placed), plot.across_name)


def _apart(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without the texts of labels that would touch the one before."""
    kept, last = [], -math.inf
    for x, text in ticks:
        free = x - last >= max(_TICK_GAP, 7.5 * len(text))
        kept.append((x, text if free else ""))
        last = x if free else last
    return kept


def _wedge(slopes: Band | None, across: Axis, axis: Axis) -> str:
    """The area between two straight lines through the origin, within the plot."""
    if slopes is None or None in slopes:
        return ""
    low, high = (float(slope or 0.0) for slope in slopes)
    xs = [max(0.0, across.low) + share / 40 * (across.high - max(0.0, across.low)) for share in range(41)]
    upper = [(across.pixel(x), axis.pixel(high * x)) for x in xs]
    lower = [(across.pixel(x), axis.pixel(low * x)) for x in reversed(xs)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *lower))
    return f'<polygon class="band" points="{corners}"/>'


def _guide(guide: tuple[Point, Point] | None, across: Axis, axis: Axis) -> str:
    if guide is None:
        return ""
    (x0, y0), (x1, y1) = ((across.pixel(x), axis.pixel(y)) for x, y in guide)
    return f'<line class="edge" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _series(series: Series, across: Axis, axis: Axis, lone: bool) -> str:
    """A lone cloud is of dots, which show the most of it; several are told apart by their shapes."""
    drawable = _drawable(series, axis.scale)
    pixels = [(across.pixel(x), axis.pixel(y)) for x, y in drawable]
    if not pixels:
        return ""
    if series.joined:
        every = max(1, math.ceil(len(pixels) / _MAX_MARKERS))
        body = line_path(pixels, "line") + "".join(marker(series.style, *pixel) for pixel in pixels[::every])
    else:
        body = cloud(pixels, 0 if lone else series.style) + _fit_line(series, drawable, across, axis)
    return f'<g class="{style_class(series.style)}">{body}</g>'


def _fit_line(series: Series, points: Sequence[Point], across: Axis, axis: Axis) -> str:
    """From the first to the last x, or from 0 where there is one x only; a casing lifts the line off the cloud."""
    if series.fit is None or not all(map(math.isfinite, series.fit)):
        return ""
    slope, intercept = series.fit
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    ends = [low if low < high else max(0.0, across.low), high]
    pixels = [(across.pixel(x), axis.pixel(intercept + slope * x)) for x in ends]
    return line_path(pixels, "casing") + line_path(pixels, "line")


def _description(plot: Plot) -> str:
    """The plot in words: how many points each series has, and between what values they lie."""
    sentences = []
    for series in plot.series:
        ys = [y for _, y in series.points]
        if ys:
            line = f", slope {series.fit[0]:.3g}" if series.fit else ""
            reach = f"lowest {min(ys):.4g}, highest {max(ys):.4g}, last {ys[-1]:.4g}"
            sentences.append(f"{series.name}: {len(ys)} points, {reach}{line}.")
    return " ".join(sentences)
