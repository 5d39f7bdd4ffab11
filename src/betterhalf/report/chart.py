"""Charts: lines over steps or over another quantity, and clouds of points with their least-squares lines.

Series differ in dash and marker as well as in colour. All charts over steps of a section zoom together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from betterhalf.report.drawing import HEIGHT, Drawing, Json, Table, series_columns
from betterhalf.report.fields import Point
from betterhalf.report.marks import (
    HEALTHY_AREA,
    HEALTHY_LINE,
    Band,
    X,
    Y,
    across,
    background,
    band_words,
    coloured,
    constant,
    dashed,
    described,
    layer,
    layered,
    shaped,
    upright,
)
from betterhalf.report.numbers import (
    Scale,
    can_draw,
    extent,
    points_of_line,
    share,
    smoothed,
    smoothing_window,
    spread,
    thin,
    value_at,
)

_STEP = "step"
_LABEL_GAP = 14 / HEIGHT
_COLUMN = 0.15
"""Share of the width beyond which labels at the ends of lines cannot touch."""
_MARKERS_PER_LINE, _MARKED = 4, 40
"""Markers of a long line; lines with at most `_MARKED` points that are not averaged have one at each point."""
_POINTS_PER_MEAN = 4
"""Points of a line for one point of its moving average."""
_CROSS = "M-1,-1L1,1M-1,1L1,-1"
_FLAG = "M0,0L1.6,0.7L0,1.4Z"
_STEPS = {"tickMinStep": 1, "tickCount": {"expr": "min(ceil(width / 80), steps[1] - steps[0])"}, "format": "d"}


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
class Series:
    """Points of one colour, dash and marker."""

    name: str
    """Full name, for the description and the values on hover."""
    style: int
    """Index of the arm: colour, dash, marker."""
    points: Sequence[Point]
    """x and y. A y that is NaN, or has no place on the scale, breaks the line."""
    joined: bool = True
    """Draw a line with markers through the points, in order; else a cloud."""
    tag: str = ""
    """Written at the line's end; empty for no label."""
    marks: tuple[Mark, ...] = ()
    second: bool = False
    """Draw the line thin and dotted, beside another line of the same style."""
    fit: tuple[float, float] | None = None
    """Slope and intercept of a straight line through the cloud."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure of one quantity (vertical) against the step or another quantity (horizontal)."""

    key: str
    """Unique on the page; part of element ids."""
    title: str
    """Name for screen readers, and heading in a file of its own."""
    series: tuple[Series, ...]
    """Series in the order of drawing: the widest cloud first, so that it does not hide the others."""
    scale: Scale = "linear"
    """Scale of the vertical axis."""
    include: tuple[float, ...] = ()
    """Values that the vertical axis must reach."""
    band: Band | None = None
    """Healthy range, shaded; None on a side means no bound there."""
    rules: tuple[tuple[float, str], ...] = ()
    """Bounds and their names, drawn where the axis reaches them."""
    smooth: bool = False
    """Draw a moving average over the faint raw line."""
    wide: bool = False
    """Draw across the page."""
    across: str = _STEP
    """Written at the end of the horizontal axis; a chart over steps can be zoomed."""
    across_range: tuple[float, float] | None = None
    """Ends of the horizontal axis; fitted to the points if absent."""
    across_include: tuple[float, ...] = ()
    """Values that a fitted horizontal axis must reach."""
    across_ticks: tuple[tuple[float, str], ...] | None = None
    """Positions and texts of the ticks of the horizontal axis; round numbers if absent."""
    wedge: Band | None = None
    """Healthy slopes of a line through the origin, in vertical units per horizontal unit; shaded."""
    guide: tuple[Point, Point] | None = None
    """Dashed line on which every point of a healthy run would be."""


def draw(chart: Chart) -> Drawing | None:
    """Return the chart, or None if no point can be drawn."""
    placed = [[point for point in _placed(chart, one.points) if math.isfinite(point[0])] for one in chart.series]
    ends = _ends(chart, [y for points in placed for _, y in points])
    if ends is None:
        return None
    both = list(zip(chart.series, placed, strict=True))
    lines = [points if one.joined else [] for one, points in both]
    clouds = [[point for point in points if _known(point) and not one.joined] for one, points in both]
    limit = points_of_line(len(lines))
    raw, means = [thin(line, limit) for line in lines], [_means(chart, line, limit) for line in lines]
    bold = [mean or line for mean, line in zip(means, raw, strict=True)]
    every = [x for points in placed for x, _ in points]
    low, high = min(every), max(every)
    steps = (low, high) if low < high else (low - 1, high + 1)
    tables = {
        "clouds": _table(chart, clouds),
        "fits": _table(chart, [_fit(one, points) for one, points in zip(chart.series, clouds, strict=True)]),
        "values": _table(chart, raw),
        "means": _table(chart, bold) if any(means) else [],
        "markers": _table(chart, [_markers(chart, b, one.style) for b, one in zip(bold, chart.series, strict=True)]),
        "events": [
            series_columns([(mark.step, mark.value)], a=one.style, text=mark.text, flag=mark.flag)
            for one in chart.series
            for mark in one.marks
        ],
        "ends": _labels(chart, bold, steps[1] - steps[0], ends),
    }
    parameters = {"names": [one.name for one in chart.series], "include": chart.include, "shown": ends}
    return Drawing(
        key=chart.key,
        title=chart.title,
        description=" ".join(filter(None, _sentences(chart))),
        spec=({"title": band_words(chart.band)} if chart.band else {})
        | layered(
            {"x": _across(chart), "y": upright(chart.scale)},
            _layers(chart, [name for name, table in tables.items() if table]),
            behind=[*background(chart.scale, chart.band, chart.rules), *_healthy(chart, high)],
            parameters=parameters | ({"steps": steps} if chart.across == _STEP else {}),
        ),
        tables=tables,
        wide=chart.wide,
    )


def _known(point: Point) -> bool:
    return math.isfinite(point[1])


def _placed(chart: Chart, points: Iterable[Point]) -> list[Point]:
    """Return the points, with NaN as each y that cannot be drawn."""
    return [(x, y if can_draw(chart.scale, y) else math.nan) for x, y in points]


def _ends(chart: Chart, values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the vertical axis; None if no value can be drawn."""
    ends = extent(values, chart.scale, chart.include, chart.band or ())
    if ends is None or chart.scale != "log10":
        return ends
    return 10.0 ** math.floor(math.log10(ends[0])), 10.0 ** math.ceil(math.log10(ends[1]))


def _sentences(chart: Chart) -> list[str]:
    """Return what screen readers say of the series and their events."""
    things = "steps" if chart.across == _STEP else "points"
    sentences = []
    for one in chart.series:
        sentences.append(described(one.name, [y for _, y in one.points], things))
        sentences += [f"Slope {one.fit[0]:.3g}."] if one.fit else []
        sentences += [f"{mark.text}." for mark in one.marks]
    return sentences


def _means(chart: Chart, line: Sequence[Point], limit: int) -> list[Point]:
    """Return points of the moving average; empty if the chart shows each step alone."""
    window = smoothing_window(len(line))
    if not chart.smooth or window == 1:
        return []
    every = math.ceil(_POINTS_PER_MEAN * len(line) / limit)
    means = smoothed([y for _, y in line], window, chart.scale)
    return _placed(chart, zip((x for x, _ in line), means, strict=True))[::-every][::-1]


def _fit(series: Series, points: Sequence[Point]) -> list[Point]:
    """Return the two ends of the fit, at the first and the last x, or from 0 with only one; empty without a fit."""
    if not points or series.fit is None or not all(map(math.isfinite, series.fit)):
        return []
    slope, intercept = series.fit
    low, high = min(points)[0], max(points)[0]
    return [(x, intercept + slope * x) for x in (low if low < high else 0.0, high)]


def _table(chart: Chart, points: Sequence[Sequence[Point]]) -> Table:
    """Return the points of each series with its style `a` and its place `k`; no series without points."""
    rows = enumerate(zip(chart.series, points, strict=True))
    return [series_columns(found, a=one.style, k=k) for k, (one, found) in rows if found]


def _markers(chart: Chart, points: Sequence[Point], style: int) -> list[Point]:
    """Return the points of a line that have a marker.

    Of a long line these are isolated points, the last, and a few between, shifted by series to keep equal curves
    visible.
    """
    drawn = [place for place, point in enumerate(points) if _known(point)]
    known = set(drawn)
    lone = {place for place in drawn if not {place - 1, place + 1} & known}
    every = len(drawn) // _MARKERS_PER_LINE
    between = drawn[every * (1 + style) // 4 % every :: every] if every > 1 else []
    short = drawn if len(drawn) <= _MARKED and not chart.smooth else []
    return [points[place] for place in sorted(lone.union(short, between, drawn[-1:]))]


def _labels(chart: Chart, bold: Sequence[list[Point]], width: float, ends: tuple[float, float]) -> Table:
    """Return the labels at the ends of lines, moved apart where lines end at about the same x."""
    columns: dict[int, list[tuple[int, Point]]] = {}
    for k, (one, points) in enumerate(zip(chart.series, bold, strict=True)):
        for point in list(filter(_known, points))[-1:] if one.tag else ():
            columns.setdefault(round(point[0] / width / _COLUMN), []).append((k, point))
    rows = []
    for column in columns.values():
        places = spread([share(chart.scale, y, ends) for _, (_, y) in column], _LABEL_GAP, 1)
        for (k, (x, _)), place in zip(column, places, strict=True):
            at, one = (x, value_at(chart.scale, place, ends)), chart.series[k]
            rows.append(series_columns([at], a=one.style, text=one.tag, k=k))
    return rows


def _layers(chart: Chart, tables: Sequence[str]) -> list[Json]:
    """Return the layers that have data, from back to front."""
    styles = [one.style for one in chart.series]
    lines = {one.style for one in chart.series if one.joined}
    listed = [k for k, one in enumerate(chart.series) if one.joined or one.style not in lines]
    stroke, fill = (coloured(styles, channel=channel) for channel in ("stroke", "fill"))
    color, shape = coloured(styles, listed), shaped(styles)
    line = color | dashed(styles, listed, [one.second for one in chart.series])
    lone = len(set(styles)) == 1
    dot = {"shape": {"value": "circle"}} if lone else shape
    averaged = "means" in tables
    place = json.dumps(f": {chart.across} ")
    words = f"names[datum.k] + {place} + format(datum.x, '.4g') + ', value ' + format(datum.y, '.4g')"
    hover = {} if chart.across == _STEP else {"tooltip": {"value": {"expr": words}}}
    top, pole = {"y": {"value": -4}}, {"y": {"value": 0}, "y2": {"value": "height"}}
    cross = {"shape": _CROSS, "size": 70, "stroke": "var(--bad)", "strokeWidth": 2, "opacity": 1}
    wait = {"color": "var(--wait)"}
    layers = [
        layer("point", "clouds", color | dot | hover, size=14, opacity=0.6, strokeWidth=1, filled=lone),
        layer("line", "fits", {"detail": {"field": "k"}}, color="var(--card)", strokeWidth=5),
        layer("line", "fits", line),
        *([layer("line", "values", stroke, strokeWidth=1, opacity=0.35)] if averaged else []),
        layer("line", "means" if averaged else "values", line),
        layer("point", "markers", fill | shape, size=34, stroke="var(--card)", strokeWidth=1, opacity=1),
        *([layer("point", "values", hover, size=220, opacity=0, fill="transparent")] if hover else []),
        layer("point", "events", {}, "!datum.flag", **cross),
        layer("rule", "events", pole, "datum.flag", strokeWidth=1.2, **wait),
        layer("point", "events", top, "datum.flag", shape=_FLAG, size=90, filled=True, opacity=1, **wait),
        layer("text", "ends", fill | {"text": {"field": "text"}}, align="left", dx=8, fontWeight=600),
    ]
    return [each for each in layers if each["data"]["name"] in tables]


def _across(chart: Chart) -> Json:
    """Return the horizontal axis."""
    if chart.across == _STEP:
        return across(chart.across, {"domain": {"expr": "steps"}, "nice": False}, _STEPS)
    values = (x for one in chart.series for x, y in one.points if can_draw(chart.scale, y))
    domain = chart.across_range or extent(values, "linear", chart.across_include)
    scale = {"domain": domain, "nice": chart.across_range is None}
    if chart.across_ticks is None:
        return across(chart.across, scale, {"tickCount": 5})
    places, texts = [place for place, _ in chart.across_ticks], [text for _, text in chart.across_ticks]
    words = f"({json.dumps(texts)})[indexof({json.dumps(places)}, datum.value)]"
    return across(chart.across, scale, {"values": places, "labelExpr": words, "labelOverlap": "greedy"})


def _healthy(chart: Chart, far: float) -> list[Json]:
    """Return the wedge between two straight lines through the origin up to `far`, and the guide."""
    low, high = chart.wedge or (0, 0)
    wedge = [{"x": x, "y": x * (low or 0), "y2": x * (high or 0)} for x in (0, far)]
    guide = [{"x": x, "y": y} for x, y in chart.guide or ()]
    return [
        *([constant("area", wedge, {"x": X, "y": Y, "y2": {"field": "y2"}}, **HEALTHY_AREA)] if chart.wedge else []),
        *([constant("line", guide, {"x": X, "y": Y}, **HEALTHY_LINE)] if guide else []),
    ]
