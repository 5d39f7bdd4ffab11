"""Line charts over steps: raw and smoothed lines, healthy band, events, names at the ends of lines.

Series differ in dash and marker as well as in colour. All charts of a section zoom together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from betterhalf.report.drawing import HEIGHT, Drawing, Json, Table, series_columns
from betterhalf.report.fields import Point
from betterhalf.report.marks import (
    Band,
    across,
    band_layers,
    coloured,
    dashed,
    expression,
    layer,
    layered,
    reach_layers,
    reached,
    rule_layers,
    shaped,
    upright,
)
from betterhalf.report.numbers import Scale, can_draw, extent, points_of_line, smoothed, smoothing_window, spread, thin
from betterhalf.report.places import free_place, share, value_at

_LABEL_GAP = 14 / HEIGHT
_COLUMN = 0.15
"""Share of the width beyond which labels at the ends of lines cannot touch."""
_MARKERS_PER_LINE = 4
_CROSS = "M-1,-1L1,1M-1,1L1,-1"
_FLAG = "M0,0L1.6,0.7L0,1.4Z"


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
class Chart:
    """A figure over steps."""

    key: str
    """Unique on the page; part of element ids."""
    title: str
    scale: Scale
    lines: tuple[Line, ...]
    unit: str = ""
    """Title of the vertical axis in a file of its own."""
    band: Band | None = None
    """Healthy range, shaded; None on a side means no bound there."""
    include: tuple[float, ...] = ()
    """Values the vertical axis must reach."""
    rules: tuple[tuple[float, str], ...] = ()
    """Bounds and their names, drawn where the axis reaches them."""
    smooth: bool = False
    """Draw a moving average over the faint raw line."""
    wide: bool = False
    """Draw across the page."""


def draw(chart: Chart) -> Drawing | None:
    """Return the chart, or None if no value can be drawn."""
    limit = points_of_line(len(chart.lines))
    thinned = [thin(_points(chart, line), limit) for line in chart.lines]
    bounds = [bound for bound in chart.band or () if bound is not None]
    ends = extent([y for points in thinned for _, y in points], chart.scale, chart.include, bounds)
    if ends is None:
        return None
    means = [_means(chart, line, limit) for line in chart.lines]
    bold = [smooth or raw for smooth, raw in zip(means, thinned, strict=True)]
    steps = [step for line in chart.lines for step in line.steps]
    span = (min(steps), max(steps))
    tables = {
        "values": _table(chart, thinned),
        "means": _table(chart, bold) if any(means) else [],
        "markers": _table(chart, [_marker_points(b, line.style) for b, line in zip(bold, chart.lines, strict=True)]),
        "ends": _ends(chart, bold, span, ends),
        "events": [_event(line, mark) for line in chart.lines for mark in line.marks],
    }
    return Drawing(
        key=chart.key,
        title=chart.title,
        unit=chart.unit,
        description=_description(chart),
        spec=_spec(chart, span, ends, tables),
        tables=tables,
        names={f"{line.style}.{part}": line.name for part, line in enumerate(chart.lines)},
        wide=chart.wide,
    )


def _points(chart: Chart, line: Line) -> list[Point]:
    """Return step and value; NaN where the value cannot be drawn."""
    drawable = [value if can_draw(chart.scale, value) else math.nan for value in line.values]
    return list(zip(line.steps, drawable, strict=True))


def _means(chart: Chart, line: Line, limit: int) -> list[Point]:
    """Return the moving average; empty if the chart shows each step alone."""
    wanted = chart.smooth and smoothing_window(len(line.values)) > 1
    return smoothed(line.steps, line.values, chart.scale, limit) if wanted else []


def _table(chart: Chart, points: Sequence[Sequence[Point]]) -> Table:
    """Return the points of each line with its style `a`, its place `k` and its kind; no line without points."""
    rows = enumerate(zip(chart.lines, points, strict=True))
    return [series_columns(found, a=line.style, k=k, second=line.second) for k, (line, found) in rows if found]


def _event(line: Line, mark: Mark) -> dict[str, object]:
    return series_columns([(mark.step, mark.value)], a=line.style, text=mark.text, flag=mark.flag)


def _spec(chart: Chart, steps: tuple[int, int], ends: tuple[float, float], tables: Mapping[str, Table]) -> Json:
    """Return the layers of the chart, from back to front."""
    styles = [line.style for line in chart.lines]
    low, high = steps if steps[0] < steps[1] else (steps[0] - 1, steps[1] + 1)
    limits = {"domainMin": {"expr": "from"}, "domainMax": {"expr": "to"}, "nice": False}
    axis = {"tickMinStep": 1, "tickCount": {"expr": "ceil(width / 80)"}, "format": "d"}
    drawn = [y for part in tables["values"] for y in part["y"] if y is not None]
    place = {"x": across("step", limits, axis), "y": upright(chart.scale, ends)}
    line = {**place, "color": coloured(styles), "detail": {"field": "k"}}
    bold = "means" if tables["means"] else "values"
    taken = [share(chart.scale, value, ends) for value in drawn]
    marker = {**place, "fill": coloured(styles), "shape": shaped(styles)}
    unzoomed = expression("from == full[0] && to == full[1] ? 1 : 0")
    label = {**place, "color": coloured(styles), "text": {"field": "text"}, "opacity": unzoomed}
    layers = [
        *band_layers(chart.band, free_place(chart.scale, chart.band, ends, taken)),
        *rule_layers(chart.rules),
        *reach_layers(place, "y", reached(chart.scale, ends, chart.include, drawn)),
        *([layer("line", "values", line, strokeWidth=1, opacity=0.35)] if tables["means"] else []),
        *_line_layers(bold, line, {"strokeDash": dashed(styles)}, two=any(each.second for each in chart.lines)),
        layer("point", "markers", marker, size=34, stroke="var(--card)", strokeWidth=1, opacity=1),
        *(_event_layers(place) if tables["events"] else []),
        layer("text", "ends", label, align="left", dx=8, fontWeight=600),
    ]
    return layered(layers, {"from": low, "to": high, "full": [low, high]})


def _line_layers(table: str, line: Json, dash: Json, *, two: bool) -> list[Json]:
    """Return the lines, and with `two` lines of a series the thin dotted ones."""
    if not two:
        return [layer("line", table, line | dash, strokeWidth=2)]
    return [
        layer("line", table, line | dash, "!datum.second", strokeWidth=2),
        layer("line", table, line, "datum.second", strokeWidth=1.3, strokeDash=[1.5, 3.5]),
    ]


def _event_layers(place: Json) -> list[Json]:
    """Return crosses on lines, and flags on poles from top to bottom."""
    at_top = {"x": place["x"], "y": {"value": -4}}
    pole = {"x": place["x"], "y": {"value": 0}, "y2": expression("height")}
    cross = {"shape": _CROSS, "size": 70, "stroke": "var(--bad)", "strokeWidth": 2, "opacity": 1}
    return [
        layer("point", "events", place, "!datum.flag", **cross),
        layer("rule", "events", pole, "datum.flag", color="var(--wait)", strokeWidth=1.2),
        layer("point", "events", at_top, "datum.flag", shape=_FLAG, size=90, fill="var(--wait)", opacity=1),
    ]


def _marker_points(points: Sequence[Point], style: int) -> list[Point]:
    """Return isolated points, the last point, and a few between, shifted by series to keep equal curves visible."""
    gaps = [math.nan, *(y for _, y in points), math.nan]
    drawn = [point for point in points if math.isfinite(point[1])]
    if not drawn:
        return []
    lone = [p for i, p in enumerate(points) if not math.isnan(p[1]) and math.isnan(gaps[i]) and math.isnan(gaps[i + 2])]
    every = len(drawn) / _MARKERS_PER_LINE
    on_the_way = [drawn[int(every * (i + (0.25 + 0.25 * style) % 1))] for i in range(_MARKERS_PER_LINE)]
    return list(dict.fromkeys([*lone, *(on_the_way if len(drawn) >= 2 * _MARKERS_PER_LINE else []), drawn[-1]]))


def _ends(chart: Chart, bold: Sequence[list[Point]], span: tuple[int, int], ends: tuple[float, float]) -> Table:
    """Return the labels at the ends of lines, moved apart where lines end at about the same step."""
    columns: dict[int, list[tuple[Line, Point]]] = {}
    for line, points in zip(chart.lines, bold, strict=True):
        for point in [point for point in points if line.tag and math.isfinite(point[1])][-1:]:
            columns.setdefault(round(point[0] / max(1, span[1] - span[0]) / _COLUMN), []).append((line, point))
    rows = []
    for column in columns.values():
        places = spread([share(chart.scale, y, ends) for _, (_, y) in column], _LABEL_GAP, 0, 1)
        for (line, (x, _)), place in zip(column, places, strict=True):
            rows.append(series_columns([(x, value_at(chart.scale, place, ends))], a=line.style, text=line.tag))
    return rows


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
