"""Line charts over steps: raw and smoothed lines, healthy band, events, names at the ends of lines.

Series differ in dash and marker as well as in colour. All charts of a section zoom together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from betterhalf.report.drawing import HEIGHT, Drawing, Json, Table, series_columns
from betterhalf.report.fields import Point
from betterhalf.report.marks import Axes, across, coloured, dashed, described, layer, shaped
from betterhalf.report.numbers import (
    can_draw,
    points_of_line,
    share,
    smoothed,
    smoothing_window,
    spread,
    thin,
    value_at,
)

_LABEL_GAP = 14 / HEIGHT
_COLUMN = 0.15
"""Share of the width beyond which labels at the ends of lines cannot touch."""
_MARKERS_PER_LINE = 4
_POINTS_PER_MEAN = 4
"""Points of a line for one point of its moving average."""
_CROSS = "M-1,-1L1,1M-1,1L1,-1"
_FLAG = "M0,0L1.6,0.7L0,1.4Z"
_AXIS = {"tickMinStep": 1, "tickCount": {"expr": "min(ceil(width / 80), steps[1] - steps[0])"}, "format": "d"}


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
    """Full name, for the description and the values on hover."""
    style: int
    """Index of the arm: colour, dash, marker."""
    steps: Sequence[int]
    values: Sequence[float]
    """One for each step; NaN breaks the line."""
    marks: tuple[Mark, ...] = ()
    second: bool = False
    """Draw the line thin and dotted, beside another line of the same series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart(Axes):
    """A figure over steps."""

    lines: tuple[Line, ...]
    smooth: bool = False
    """Draw a moving average over the faint raw line."""
    wide: bool = False
    """Draw across the page."""


def draw(chart: Chart) -> Drawing | None:
    """Return the chart, or None if no value can be drawn."""
    limit = points_of_line(len(chart.lines))
    raw = [thin(_points(chart, line, line.values), limit) for line in chart.lines]
    ends = chart.ends(y for points in raw for _, y in points)
    if ends is None:
        return None
    means = [_means(chart, line, limit) for line in chart.lines]
    bold = [smooth or points for smooth, points in zip(means, raw, strict=True)]
    steps = [step for line in chart.lines for step in line.steps]
    first, last = min(steps), max(steps)
    sentences = [
        words
        for line in chart.lines
        for words in (described(line.name, line.values, "steps"), *(f"{mark.text}." for mark in line.marks))
    ]
    tables = {
        "values": _table(chart, raw),
        "means": _table(chart, bold) if any(means) else [],
        "markers": _table(chart, [_markers(b, line.style) for b, line in zip(bold, chart.lines, strict=True)]),
        "ends": _labels(chart, bold, last - first, ends),
        "events": [
            series_columns([(mark.step, mark.value)], a=line.style, text=mark.text, flag=mark.flag)
            for line in chart.lines
            for mark in line.marks
        ],
    }
    return Drawing(
        key=chart.key,
        title=chart.title,
        description=" ".join(filter(None, sentences)),
        spec=chart.specification(
            across("step", {"domain": {"expr": "steps"}, "nice": False}, _AXIS),
            _layers(chart, "means" if any(means) else "values", events=bool(tables["events"])),
            names=[line.name for line in chart.lines],
            include=chart.include,
            shown=ends,
            steps=(first, last) if first < last else (first - 1, last + 1),
        ),
        tables=tables,
        wide=chart.wide,
    )


def _points(chart: Chart, line: Line, values: Sequence[float]) -> list[Point]:
    """Return step and value; NaN where the value cannot be drawn."""
    return [(x, y if can_draw(chart.scale, y) else math.nan) for x, y in zip(line.steps, values, strict=True)]


def _means(chart: Chart, line: Line, limit: int) -> list[Point]:
    """Return points of the moving average; empty if the chart shows each step alone."""
    window = smoothing_window(len(line.values))
    if not chart.smooth or window == 1:
        return []
    every = math.ceil(_POINTS_PER_MEAN * len(line.values) / limit)
    return _points(chart, line, smoothed(line.values, window, chart.scale))[::-every][::-1]


def _table(chart: Chart, points: Sequence[Sequence[Point]]) -> Table:
    """Return the points of each line with its style `a` and its place `k`; no line without points."""
    rows = enumerate(zip(chart.lines, points, strict=True))
    return [series_columns(found, a=line.style, k=k) for k, (line, found) in rows if found]


def _layers(chart: Chart, bold: str, *, events: bool) -> list[Json]:
    """Return lines, markers, events and labels, from back to front."""
    styles, listed = [line.style for line in chart.lines], list(range(len(chart.lines)))
    stroke, fill = (coloured(styles, channel=channel) for channel in ("stroke", "fill"))
    dash = dashed(styles, listed, [line.second for line in chart.lines])
    top, pole = {"y": {"value": -4}}, {"y": {"value": 0}, "y2": {"value": "height"}}
    cross = {"shape": _CROSS, "size": 70, "stroke": "var(--bad)", "strokeWidth": 2, "opacity": 1}
    flags = [
        layer("point", "events", {}, "!datum.flag", **cross),
        layer("rule", "events", pole, "datum.flag", color="var(--wait)", strokeWidth=1.2),
        layer("point", "events", top, "datum.flag", shape=_FLAG, size=90, filled=True, color="var(--wait)", opacity=1),
    ]
    return [
        *([layer("line", "values", stroke, strokeWidth=1, opacity=0.35)] if bold == "means" else []),
        layer("line", bold, coloured(styles, listed) | dash),
        layer("point", "markers", fill | shaped(styles), size=34, stroke="var(--card)", strokeWidth=1, opacity=1),
        *(flags if events else []),
        layer("text", "ends", fill | {"text": {"field": "text"}}, align="left", dx=8, fontWeight=600),
    ]


def _markers(points: Sequence[Point], style: int) -> list[Point]:
    """Return isolated points, the last point, and a few between, shifted by series to keep equal curves visible."""
    drawn = [place for place, (_, y) in enumerate(points) if math.isfinite(y)]
    known = set(drawn)
    lone = {place for place in drawn if not {place - 1, place + 1} & known}
    every = len(drawn) // _MARKERS_PER_LINE
    between = drawn[every * (1 + style) // 4 % every :: every] if every > 1 else []
    return [points[place] for place in sorted(lone.union(between, drawn[-1:]))]


def _labels(chart: Chart, bold: Sequence[list[Point]], width: int, ends: tuple[float, float]) -> Table:
    """Return the labels at the ends of lines, moved apart where lines end at about the same step."""
    columns: dict[int, list[tuple[int, Point]]] = {}
    for k, (line, points) in enumerate(zip(chart.lines, bold, strict=True)):
        for point in [point for point in points if line.tag and math.isfinite(point[1])][-1:]:
            columns.setdefault(round(point[0] / max(1, width) / _COLUMN), []).append((k, point))
    rows = []
    for column in columns.values():
        places = spread([share(chart.scale, y, ends) for _, (_, y) in column], _LABEL_GAP, 1)
        for (k, (x, _)), place in zip(column, places, strict=True):
            at, line = (x, value_at(chart.scale, place, ends)), chart.lines[k]
            rows.append(series_columns([at], a=line.style, text=line.tag, k=k))
    return rows
