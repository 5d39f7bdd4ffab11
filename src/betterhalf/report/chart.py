"""Line charts over steps as inline SVG: raw and smoothed lines, healthy band, events, names at the ends of lines.

Series differ in dash and marker as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from betterhalf.report.axis import Axis, Scale, can_draw, fit, step_ticks, steps_axis
from betterhalf.report.canvas import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDE,
    WIDE_RIGHT,
    WIDTH,
    Band,
    Point,
    across_labels,
    band_area,
    band_label,
    grid,
    line_path,
    marker,
    rules,
    spread,
    style_class,
    svg,
)

_LABEL_GAP = 14
_COLUMN = 60
"""Horizontal distance in pixels beyond which end labels cannot touch."""
_MARKERS_PER_LINE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An event: a cross on the line, or a flag from top to bottom of the plot."""

    step: int
    value: float = math.nan
    """Height of the cross; a flag has none."""
    text: str
    """Shown on hover, and read by screen readers."""
    flag: bool = False
    """Draw a flag instead of a cross."""


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
    second: bool = False
    """Draw the line thin and dotted, beside another line of the same series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure over steps."""

    key: str
    """Unique on the page; part of element ids."""
    title: str
    scale: Scale
    lines: tuple[Line, ...]
    band: Band | None = None
    """Healthy range, shaded; None on a side means no bound there."""
    include: tuple[float, ...] = ()
    """Values the vertical axis must reach."""
    rules: tuple[tuple[float, str], ...] = ()
    """Bounds and their names, drawn where the axis reaches them."""
    smooth: bool = False
    """Draw a moving average over the faint raw line."""
    wide: bool = False
    """Draw across the page; a wide chart has no band and no rules."""

    @property
    def right(self) -> int:
        """Right edge of the plot, in pixels."""
        return WIDE_RIGHT if self.wide else RIGHT


def draw(chart: Chart) -> str | None:
    """Return the chart as an `<svg>` element, or None if no value can be drawn."""
    values = [value for line in chart.lines for value in line.values]
    axis = fit(values, scale=chart.scale, start=BOTTOM, end=TOP, include=chart.include)
    if axis is None:
        return None
    across = steps_axis([step for line in chart.lines for step in line.steps], start=LEFT, end=chart.right)
    parts = [band_area(chart.band, axis), grid(axis, chart.right), _step_labels(across)]
    parts.append(rules(axis, chart.rules))
    occupied = [axis.pixel(value) for value in values if can_draw(chart.scale, value)]
    parts += [_series(chart, line, across, axis) for line in chart.lines]
    parts += [_end_labels(chart, across, axis), band_label(chart.band, axis, occupied)]
    width = WIDE if chart.wide else WIDTH
    return svg(chart.key, chart.title, _description(chart), "".join(parts), width=width)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the finite values in a centred window, shorter at the ends; NaN where the value is missing."""
    half = window // 2
    means = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - half) : index + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return means


def smoothed(chart: Chart, line: Line) -> list[float]:
    """Return the values of the bold line: a moving average, geometric on a logarithmic axis, to damp lone spikes."""
    window = smoothing_window(len(line.values)) if chart.smooth else 1
    if window == 1:
        return list(line.values)
    if chart.scale == "linear":
        return moving_average(line.values, window)
    logs = [math.log(value) if can_draw(chart.scale, value) else math.nan for value in line.values]
    return [math.exp(mean) for mean in moving_average(logs, window)]


def smoothing_window(count: int) -> int:
    """Return an odd window of about a twelfth of `count` values; 1 (no smoothing) for short runs."""
    return 1 if count < 15 else 2 * (count // 24) + 3


def segments(line: Line, scale: Scale, across: Axis, axis: Axis, values: Sequence[float]) -> list[list[Point]]:
    """Return the pixel positions of the unbroken stretches of a line."""
    stretches: list[list[Point]] = [[]]
    for step, value in zip(line.steps, values, strict=True):
        if can_draw(scale, value):
            stretches[-1].append((across.pixel(step), axis.pixel(value)))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _step_labels(across: Axis) -> str:
    return across_labels([(across.pixel(step), str(step)) for step in step_ticks(across)], "step", across.end)


def _series(chart: Chart, line: Line, across: Axis, axis: Axis) -> str:
    shown = segments(line, axis.scale, across, axis, smoothed(chart, line))
    parts = [_flag(mark, across) for mark in line.marks if mark.flag]
    if chart.smooth and smoothing_window(len(line.values)) > 1:
        parts += [line_path(points, "raw") for points in segments(line, axis.scale, across, axis, line.values)]
    parts += [line_path(points, "line second" if line.second else "line") for points in shown]
    parts += [marker(line.style, *point) for point in _marker_points(shown, line.style)]
    parts += [_cross(mark, across, axis) for mark in line.marks if can_draw(axis.scale, mark.value)]
    return f'<g class="{style_class(line.style)}">{"".join(parts)}</g>'


def _marker_points(stretches: list[list[Point]], style: int) -> list[Point]:
    """Return isolated points, the last point, and a few between, shifted by series to keep equal curves visible."""
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


def _flag(mark: Mark, across: Axis) -> str:
    """Return a vertical line at the step, with a small flag at its top."""
    x = across.pixel(mark.step)
    side = -9 if x > across.end - 12 else 9
    shape = f"M{x:.1f} {BOTTOM}V{TOP - 6}l{side} 4l{-side} 4"
    return f'<g class="flag"><title>{escape(mark.text)}</title><path d="{shape}"/></g>'


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
    """Return the labels of lines that end at about the same step, moved apart."""
    heights = spread([point[1] for _, point in ends], _LABEL_GAP, TOP, BOTTOM)
    return "".join(
        f'<text class="end {style_class(line.style)}" x="{point[0] + 8:.1f}" y="{y + 4:.1f}">{escape(line.tag)}</text>'
        for (line, point), y in zip(ends, heights, strict=True)
    )


def _description(chart: Chart) -> str:
    """Describe the chart in words: first, last, lowest and highest value of each series, and its events."""
    sentences = []
    for line in chart.lines:
        finite = [value for value in line.values if math.isfinite(value)]
        if finite:
            sentences.append(
                f"{line.name}: {len(finite)} steps, first {finite[0]:.4g}, last {finite[-1]:.4g}, "
                f"lowest {min(finite):.4g}, highest {max(finite):.4g}."
            )
        sentences += [f"{mark.text}." for mark in line.marks]
    return " ".join(sentences)
