"""Plots of one quantity against another as inline SVG: point clouds with least-squares lines, and connected points.

They show pi against mu, log-ratio against length, bins and layers.
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
"""Minimum distance in pixels between labels of the horizontal axis."""
_LABEL_WIDTH = 125
"""Maximum width of the band's label in pixels."""


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
    """A figure of one quantity (vertical) against another (horizontal)."""

    key: str
    """Unique on the page; part of element ids."""
    title: str
    series: tuple[Series, ...]
    """Series in the order of drawing: the widest cloud first, so that it does not hide the others."""
    across_name: str
    """Written at the end of the horizontal axis."""
    scale: Scale = "linear"
    """Scale of the vertical axis."""
    include: tuple[float, ...] = ()
    """Values the vertical axis must reach."""
    across_range: tuple[float, float] | None = None
    """Ends of the horizontal axis; fitted to the points if absent."""
    across_include: tuple[float, ...] = ()
    """Values that a fitted horizontal axis must reach."""
    across_ticks: tuple[tuple[float, str], ...] | None = None
    """Positions and texts of the ticks of the horizontal axis; round numbers if absent."""
    band: Band | None = None
    """Healthy range, shaded."""
    wedge: Band | None = None
    """Healthy slopes of a line through the origin, in vertical units per horizontal unit; shaded."""
    rules: tuple[tuple[float, str], ...] = ()
    """Horizontal lines with short names, which are written beside the plot."""
    guide: tuple[Point, Point] | None = None
    """Dashed line on which every point of a healthy run would be."""


def draw_plot(plot: Plot) -> str | None:
    """Return the plot as an `<svg>` element, or None if no point can be drawn."""
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
    parts += [band_label(plot.band, axis, _occupied(plot, across, axis))]
    return svg(plot.key, plot.title, _description(plot), "".join(parts))


def whole_ticks(values: Iterable[int]) -> tuple[tuple[float, str], ...]:
    """Return ticks at whole numbers, such as layers: at most eight of the values, from the first on."""
    ordered = sorted(set(values))
    return tuple((float(value), str(value)) for value in ordered[:: max(1, math.ceil(len(ordered) / _WHOLE_TICKS))])


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


def _drawable(series: Series, scale: Scale) -> list[Point]:
    return [(x, y) for x, y in series.points if math.isfinite(x) and can_draw(scale, y)]


def _occupied(plot: Plot, across: Axis, axis: Axis) -> list[float]:
    """Return the heights in pixels of points and lines near the band's label; of all points if none are near."""
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
    """Remove the texts of labels that would touch the previous one."""
    kept, last = [], -math.inf
    for x, text in ticks:
        free = x - last >= max(_TICK_GAP, 7.5 * len(text))
        kept.append((x, text if free else ""))
        last = x if free else last
    return kept


def _wedge(slopes: Band | None, across: Axis, axis: Axis) -> str:
    """Return the area between two straight lines through the origin, within the plot."""
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
    """Draw one series; a single cloud consists of dots, which show the most, and several clouds differ in shape."""
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
    """Draw the fit from the first to the last x, or from 0 with only one; an outline separates it from the cloud."""
    if series.fit is None or not all(map(math.isfinite, series.fit)):
        return ""
    slope, intercept = series.fit
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    ends = [low if low < high else max(0.0, across.low), high]
    pixels = [(across.pixel(x), axis.pixel(intercept + slope * x)) for x in ends]
    return line_path(pixels, "casing") + line_path(pixels, "line")


def _description(plot: Plot) -> str:
    """Describe the plot in words: the number of points of each series, and the range of their values."""
    sentences = []
    for series in plot.series:
        ys = [y for _, y in series.points]
        if ys:
            line = f", slope {series.fit[0]:.3g}" if series.fit else ""
            reach = f"lowest {min(ys):.4g}, highest {max(ys):.4g}, last {ys[-1]:.4g}"
            sentences.append(f"{series.name}: {len(ys)} points, {reach}{line}.")
    return " ".join(sentences)
