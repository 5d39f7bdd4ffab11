"""Plots of one quantity against another: point clouds with least-squares lines, and connected points.

They show pi against mu, log-ratio against length, bins and layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from betterhalf.report.drawing import Drawing, Json, series_columns
from betterhalf.report.fields import Point
from betterhalf.report.marks import (
    Band,
    across,
    band_layers,
    coloured,
    constant,
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
from betterhalf.report.numbers import Scale, can_draw, extent
from betterhalf.report.places import free_place, share

_MAX_MARKERS = 40
_WHOLE_TICKS = 8
_WEDGE_PARTS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one colour, dash and marker."""

    name: str
    """Full name, for the description and on hover."""
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
    unit: str = ""
    """Title of the vertical axis in a file of its own."""
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


def draw_plot(plot: Plot) -> Drawing | None:
    """Return the plot, or None if no point can be drawn."""
    kept = [(one, points) for one in plot.series if (points := _drawable(one, plot.scale))]
    bounds = [bound for bound in plot.band or () if bound is not None]
    ends = extent([y for _, points in kept for _, y in points], plot.scale, plot.include, bounds)
    if ends is None:
        return None
    named = [(series_columns(points, a=one.style, name=one.name), one.joined) for one, points in kept]
    fits = [series_columns(_fit_ends(one, points), a=one.style) for one, points in kept]
    return Drawing(
        key=plot.key,
        title=plot.title,
        unit=plot.unit,
        description=_description(plot),
        spec=_spec(plot, kept, ends),
        tables={
            "joined": [table for table, joined in named if joined],
            "clouds": [table for table, joined in named if not joined],
            "fits": [table for table in fits if table["x"]],
        },
        names={str(one.style): one.name for one, _ in reversed(kept)},
    )


def whole_ticks(values: Iterable[int]) -> tuple[tuple[float, str], ...]:
    """Return ticks at whole numbers, such as layers: at most eight of the values, from the first on."""
    ordered = sorted(set(values))
    return tuple((float(value), str(value)) for value in ordered[:: max(1, math.ceil(len(ordered) / _WHOLE_TICKS))])


def _drawable(series: Series, scale: Scale) -> list[Point]:
    return [(x, y) for x, y in series.points if math.isfinite(x) and can_draw(scale, y)]


def _spec(plot: Plot, kept: Sequence[tuple[Series, list[Point]]], ends: tuple[float, float]) -> Json:
    """Return the layers of the plot, from back to front."""
    styles = [one.style for one, _ in kept]
    values = [y for _, points in kept for _, y in points]
    up = upright(plot.scale, ends)
    place = {"x": _across(plot), "y": up, "color": coloured(styles)}
    dash, shape, hover = {"strokeDash": dashed(styles)}, {"shape": shaped(styles)}, {"tooltip": _hover(plot)}
    lone = len(set(styles)) == 1
    dot = {"shape": {"value": "circle"}} if lone else shape
    few = all(len(points) <= _MAX_MARKERS for one, points in kept if one.joined)
    taken = [share(plot.scale, value, ends) for value in values]
    layers = [
        *reach_layers(place, "x", plot.across_include if plot.across_range is None else ()),
        *reach_layers(place, "y", reached(plot.scale, ends, plot.include, values)),
        *band_layers(plot.band, free_place(plot.scale, plot.band, ends, taken)),
        *_wedge(plot.wedge),
        *rule_layers(plot.rules, beside=True),
        *_guide(plot.guide),
        layer("point", "clouds", place | dot | hover, size=14, opacity=0.6, strokeWidth=1, filled=lone),
        layer("line", "fits", {"x": place["x"], "y": up, "detail": {"field": "a"}}, color="var(--card)", strokeWidth=5),
        layer("line", "fits", place | dash, strokeWidth=2),
        layer("line", "joined", place | dash, strokeWidth=2),
        layer("point", "joined", place | shape, size=30, filled=True, opacity=1 if few else 0),
        layer("point", "joined", place | hover, size=220, opacity=0, fill="transparent"),
    ]
    return layered(layers)


def _hover(plot: Plot) -> list[Json]:
    """Return the content of the box on hover."""
    numbers = {"x": plot.across_name, "y": "value"}
    return [{"field": "name", "type": "nominal", "title": " "}] + [
        {"field": field, "type": "quantitative", "title": title, "format": ".4g"} for field, title in numbers.items()
    ]


def _across(plot: Plot) -> Json:
    """Return the horizontal axis."""
    scale: Json = {"domain": list(plot.across_range), "nice": False} if plot.across_range else {}
    if plot.across_ticks is None:
        return across(plot.across_name, scale, {"tickCount": 5})
    places, texts = [place for place, _ in plot.across_ticks], [text for _, text in plot.across_ticks]
    words = f"({json.dumps(texts)})[indexof({json.dumps(places)}, datum.value)]"
    return across(plot.across_name, scale, {"values": places, "labelExpr": words, "labelOverlap": "greedy"})


def _wedge(slopes: Band | None) -> list[Json]:
    """Return the area between two straight lines through the origin, within the plot."""
    if slopes is None or None in slopes:
        return []
    start = "max(0, domain('x')[0])"
    place = f"({start} + datum.p / {_WEDGE_PARTS} * (domain('x')[1] - {start}))"
    low, high = (expression(f"clamp(scale('y', {slope!r} * {place}), 0, height)") for slope in slopes)
    area = constant(
        "area", {"x": expression(f"scale('x', {place})"), "y": high, "y2": low}, color="var(--edge)", opacity=0.12
    )
    return [area | {"data": {"sequence": {"start": 0, "stop": _WEDGE_PARTS + 1, "as": "p"}}}]


def _guide(guide: tuple[Point, Point] | None) -> list[Json]:
    if guide is None:
        return []
    (x0, y0), (x1, y1) = guide
    ends = {"x": f"scale('x', {x0})", "x2": f"scale('x', {x1})", "y": f"scale('y', {y0})", "y2": f"scale('y', {y1})"}
    channels = {name: expression(place) for name, place in ends.items()}
    return [constant("rule", channels, color="var(--edge)", strokeDash=[2, 3], strokeWidth=1.2)]


def _fit_ends(series: Series, points: Sequence[Point]) -> list[Point]:
    """Return the fit at the first and the last x, or from 0 with only one."""
    if series.fit is None or not all(map(math.isfinite, series.fit)):
        return []
    slope, intercept = series.fit
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    return [(x, intercept + slope * x) for x in (low if low < high else 0.0, high)]


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
