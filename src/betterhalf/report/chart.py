"""Line charts as inline SVG: raw and smoothed lines, healthy band, markers, names at the ends of lines.

A series is told from another by dash and marker as well as by colour; each chart carries a title and a description
for screen readers. Colours come from CSS, so that one drawing serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from betterhalf.report.axis import Axis, Scale, can_draw, fit, step_ticks, steps_axis

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 392, 12, 216
"""Edges of the plot area in pixels of the view box."""

STYLES = 6
"""Distinct colours; series beyond that reuse them."""

_LABEL_GAP = 14
_COLUMN = 60
"""Labels further apart than this across cannot touch."""
_MARKERS_PER_LINE = 4
_MAX_POINTS = 800

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An event on a line, drawn as a cross."""

    step: int
    value: float
    text: str
    """Shown on hovering, and read out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series."""

    tag: str
    """Written at the line's end; empty for no label."""
    name: str
    """Full name, for the description."""
    style: int
    """Index of the arm: colour, dash, marker."""
    steps: Sequence[int]
    values: Sequence[float]
    """One for each step; NaN breaks the line."""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure over steps."""

    key: str
    """Unique on the page; part of element ids."""
    title: str
    scale: Scale
    lines: tuple[Line, ...]
    band: tuple[float | None, float | None] | None = None
    """Healthy range, shaded; None on a side means no bound there."""
    include: tuple[float, ...] = ()
    """Values the vertical axis must reach."""
    smooth: bool = False
    """Draw a moving average over the faint raw line."""


def draw(chart: Chart) -> str | None:
    """The chart as an `<svg>` element, or None when no value can be drawn."""
    values = [value for line in chart.lines for value in line.values]
    axis = fit(values, scale=chart.scale, start=BOTTOM, end=TOP, include=chart.include)
    if axis is None:
        return None
    across = steps_axis([step for line in chart.lines for step in line.steps], start=LEFT, end=RIGHT)
    parts = [_band(chart.band, axis), _grid(axis), _step_labels(across)]
    inked = [axis.pixel(value) for value in values if can_draw(chart.scale, value)]
    parts += [_series(chart, line, across, axis) for line in chart.lines]
    parts += [_end_labels(chart, across, axis), _band_label(chart.band, axis, inked)]
    return svg(chart.key, chart.title, _description(chart), "".join(parts))


def svg(key: str, title: str, description: str, body: str, height: int = HEIGHT) -> str:
    """An accessible `<svg>` around `body`."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>{body}</svg>'
    )


def style_class(index: int) -> str:
    """CSS class of the series at `index`."""
    return f"s{index % STYLES}"


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values in a centred window, shortened at the ends; NaN where the value itself is missing."""
    half = window // 2
    means = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - half) : index + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return means


def smoothed(chart: Chart, line: Line) -> list[float]:
    """The values drawn bold: a moving average, geometric on a logarithmic axis lest a lone spike rule it."""
    window = smoothing_window(len(line.values)) if chart.smooth else 1
    if window == 1:
        return list(line.values)
    if chart.scale == "linear":
        return moving_average(line.values, window)
    logs = [math.log(value) if can_draw(chart.scale, value) else math.nan for value in line.values]
    return [math.exp(mean) for mean in moving_average(logs, window)]


def smoothing_window(count: int) -> int:
    """An odd window of about a twelfth of `count` values; 1, which smooths nothing, for short runs."""
    return 1 if count < 15 else 2 * (count // 24) + 3


def marker(style: int, x: float, y: float, size: float = 3.2) -> str:
    """A small filled shape that belongs to the series `style`: circle, square, triangle, diamond."""
    shape = style % 4
    if shape == 0:
        return f'<circle class="m" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.3), (1.2, 1), (-1.2, 1)),
        3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    }[shape]
    points = " ".join(f"{x + dx * size * 0.9:.1f},{y + dy * size * 0.9:.1f}" for dx, dy in corners)
    return f'<polygon class="m" points="{points}"/>'


def segments(line: Line, scale: Scale, across: Axis, axis: Axis, values: Sequence[float]) -> list[list[Point]]:
    """Pixel positions of the unbroken stretches of a line."""
    stretches: list[list[Point]] = [[]]
    for step, value in zip(line.steps, values, strict=True):
        if can_draw(scale, value):
            stretches[-1].append((across.pixel(step), axis.pixel(value)))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def thin(points: list[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` points that keep every visible extreme: lowest and highest of each bucket, in order."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`positions` moved as little as needed to lie `gap` apart within [low, high]; their order is kept."""
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


def _band(band: tuple[float | None, float | None] | None, axis: Axis) -> str:
    if band is None:
        return ""
    low = axis.low if band[0] is None else band[0]
    high = axis.high if band[1] is None else band[1]
    top, bottom = axis.pixel(high), axis.pixel(low)
    edges = "".join(
        f'<line class="edge" x1="{LEFT}" x2="{RIGHT}" y1="{axis.pixel(bound):.1f}" y2="{axis.pixel(bound):.1f}"/>'
        for bound in band
        if bound is not None and axis.low < bound < axis.high
    )
    rect = f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{RIGHT - LEFT}" height="{bottom - top:.1f}"/>'
    return rect + edges


def _band_label(band: tuple[float | None, float | None] | None, axis: Axis, inked: Sequence[float]) -> str:
    """The band in words, at the height within it that is furthest from the data."""
    if band is None:
        return ""
    top = axis.pixel(axis.high if band[1] is None else band[1]) + 15
    bottom = axis.pixel(axis.low if band[0] is None else band[0]) - 6
    if bottom < top:
        return ""
    heights = [top + (bottom - top) * share / 8 for share in range(9)]
    y = max(heights, key=lambda height: min(abs(height - 4 - ink) for ink in inked))
    return f'<text class="bandname" x="{LEFT + 6}" y="{y:.1f}">{escape(_band_words(band, axis))}</text>'


def _band_words(band: tuple[float | None, float | None], axis: Axis) -> str:
    low, high = band
    if low is not None and high is not None:
        return f"healthy: {axis.label(low)} to {axis.label(high)}"
    bound = high if high is not None else low
    return "" if bound is None else f"healthy: {'below' if low is None else 'above'} {axis.label(bound)}"


def _grid(axis: Axis) -> str:
    parts = []
    for tick in axis.ticks():
        y = axis.pixel(tick)
        zero = " zero" if tick == 0 else ""
        parts.append(f'<line class="grid{zero}" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{axis.label(tick)}</text>')
    return "".join(parts)


def _step_labels(across: Axis) -> str:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>']
    for step in step_ticks(across):
        x = across.pixel(step)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{step}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - 4}" y="{BOTTOM + 17}" text-anchor="end">step</text>')
    return "".join(parts)


def _series(chart: Chart, line: Line, across: Axis, axis: Axis) -> str:
    shown = segments(line, axis.scale, across, axis, smoothed(chart, line))
    parts = []
    if chart.smooth and smoothing_window(len(line.values)) > 1:
        parts += [_path(points, "raw") for points in segments(line, axis.scale, across, axis, line.values)]
    parts += [_path(points, "line") for points in shown]
    parts += [marker(line.style, *point) for point in _marker_points(shown, line.style)]
    parts += [_cross(mark, across, axis) for mark in line.marks if can_draw(axis.scale, mark.value)]
    return f'<g class="{style_class(line.style)}">{"".join(parts)}</g>'


def _path(points: list[Point], kind: str) -> str:
    moves = "L".join(f"{x:.1f} {y:.1f}" for x, y in thin(points))
    return f'<path class="{kind}" d="M{moves}"/>'


def _marker_points(stretches: list[list[Point]], style: int) -> list[Point]:
    """Lone points, the last point, and a few on the way, shifted by series lest equal curves hide each other's."""
    lone = [stretch[0] for stretch in stretches if len(stretch) == 1]
    path = [point for stretch in stretches for point in stretch]
    if not path:
        return []
    every = len(path) / _MARKERS_PER_LINE
    on_the_way = [path[int(every * (i + (0.25 + 0.25 * style) % 1))] for i in range(_MARKERS_PER_LINE)]
    return list(dict.fromkeys([*lone, *(on_the_way if len(path) >= 2 * _MARKERS_PER_LINE else []), path[-1]]))


def _cross(mark: Mark, across: Axis, axis: Axis) -> str:
    x, y = across.pixel(mark.step), axis.pixel(mark.value)
    arms = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
    return f'<g class="mark"><title>{escape(mark.text)}</title><path d="{arms}"/></g>'


def _end_labels(chart: Chart, across: Axis, axis: Axis) -> str:
    ends = []
    for line in chart.lines:
        points = [p for stretch in segments(line, axis.scale, across, axis, smoothed(chart, line)) for p in stretch]
        if line.tag and points:
            ends.append((line, points[-1]))
    return "".join(_label_column([end for end in ends if round(end[1][0] / _COLUMN) == c]) for c in _columns(ends))


def _columns(ends: list[tuple[Line, Point]]) -> list[int]:
    return sorted({round(point[0] / _COLUMN) for _, point in ends})


def _label_column(ends: list[tuple[Line, Point]]) -> str:
    """Labels of lines that end at about the same step, moved apart."""
    heights = spread([point[1] for _, point in ends], _LABEL_GAP, TOP, BOTTOM)
    return "".join(
        f'<text class="end {style_class(line.style)}" x="{point[0] + 8:.1f}" y="{y + 4:.1f}">{escape(line.tag)}</text>'
        for (line, point), y in zip(ends, heights, strict=True)
    )


def _description(chart: Chart) -> str:
    """The chart in words: where each series starts, ends, and how far it reaches."""
    sentences = []
    for line in chart.lines:
        finite = [value for value in line.values if math.isfinite(value)]
        if finite:
            sentences.append(
                f"{line.name}: {len(finite)} steps, first {finite[0]:.4g}, last {finite[-1]:.4g}, "
                f"lowest {min(finite):.4g}, highest {max(finite):.4g}."
            )
    return " ".join(sentences)
