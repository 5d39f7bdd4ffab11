"""Plots of one quantity against another: point clouds with least-squares lines, and connected points.

They show pi against mu, log-ratio against length, bins and layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from betterhalf.report.drawing import Drawing, Json, series_columns
from betterhalf.report.fields import Point
from betterhalf.report.marks import (
    HEALTHY_AREA,
    HEALTHY_LINE,
    Axes,
    Band,
    X,
    Y,
    across,
    coloured,
    constant,
    dashed,
    described,
    layer,
    shaped,
)
from betterhalf.report.numbers import can_draw, extent

_MAX_MARKERS = 40


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
class Plot(Axes):
    """A figure of one quantity (vertical) against another (horizontal)."""

    series: tuple[Series, ...]
    """Series in the order of drawing: the widest cloud first, so that it does not hide the others."""
    across_name: str
    """Written at the end of the horizontal axis."""
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


def draw_plot(plot: Plot) -> Drawing | None:
    """Return the plot, or None if no point can be drawn."""
    points = [[(x, y) for x, y in one.points if math.isfinite(x) and can_draw(plot.scale, y)] for one in plot.series]
    ends = plot.ends(y for found in points for _, y in found)
    if ends is None:
        return None
    tables: dict[str, list[dict[str, object]]] = {"joined": [], "clouds": [], "fits": []}
    for k, (one, found) in enumerate(zip(plot.series, points, strict=True)):
        if found:
            tables["joined" if one.joined else "clouds"].append(series_columns(found, a=one.style, k=k))
            tables["fits"] += [series_columns(fit, a=one.style, k=k) for fit in _fit(one, found)]
    few = all(len(found) <= _MAX_MARKERS for one, found in zip(plot.series, points, strict=True) if one.joined)
    sentences = [
        described(one.name, [y for _, y in one.points], "points") + (f" Slope {one.fit[0]:.3g}." if one.fit else "")
        for one in plot.series
    ]
    return Drawing(
        key=plot.key,
        title=plot.title,
        description=" ".join(filter(None, sentences)),
        spec=plot.specification(
            _across(plot), _layers(plot, few=few), _healthy(plot), names=[one.name for one in plot.series], shown=ends
        ),
        tables=tables,
    )


def _layers(plot: Plot, *, few: bool) -> list[Json]:
    """Return the layers of the plot, from back to front."""
    styles = [one.style for one in plot.series]
    lines = {one.style for one in plot.series if one.joined}
    listed = [k for k, one in enumerate(plot.series) if one.joined or one.style not in lines]
    color, dash, shape = coloured(styles, listed), dashed(styles, listed), shaped(styles)
    place = json.dumps(f": {plot.across_name} ")
    words = f"names[datum.k] + {place} + format(datum.x, '.4g') + ', value ' + format(datum.y, '.4g')"
    hover = {"tooltip": {"value": {"expr": words}}}
    lone = len(set(styles)) == 1
    dot = {"shape": {"value": "circle"}} if lone else shape
    return [
        layer("point", "clouds", color | dot | hover, size=14, opacity=0.6, strokeWidth=1, filled=lone),
        layer("line", "fits", {"detail": {"field": "k"}}, color="var(--card)", strokeWidth=5),
        layer("line", "fits", color | dash),
        layer("line", "joined", color | dash),
        layer(
            "point", "joined", coloured(styles, channel="fill") | shape, size=30, strokeWidth=0, opacity=1 if few else 0
        ),
        layer("point", "joined", hover, size=220, opacity=0, fill="transparent"),
    ]


def _across(plot: Plot) -> Json:
    """Return the horizontal axis."""
    values = (x for one in plot.series for x, y in one.points if can_draw(plot.scale, y))
    domain = plot.across_range or extent(values, "linear", plot.across_include)
    scale = {"domain": domain, "nice": plot.across_range is None}
    if plot.across_ticks is None:
        return across(plot.across_name, scale, {"tickCount": 5})
    places, texts = [place for place, _ in plot.across_ticks], [text for _, text in plot.across_ticks]
    words = f"({json.dumps(texts)})[indexof({json.dumps(places)}, datum.value)]"
    return across(plot.across_name, scale, {"values": places, "labelExpr": words, "labelOverlap": "greedy"})


def _healthy(plot: Plot) -> list[Json]:
    """Return the wedge between two straight lines through the origin, and the guide."""
    low, high = plot.wedge or (0, 0)
    far = max(x for one in plot.series for x, _ in one.points)
    wedge = [{"x": x, "y": x * (low or 0), "y2": x * (high or 0)} for x in (0, far)] if plot.wedge else []
    guide = [{"x": x, "y": y} for x, y in plot.guide or ()]
    return [
        constant("area", wedge, {"x": X, "y": Y, "y2": {"field": "y2"}}, **HEALTHY_AREA),
        constant("line", guide, {"x": X, "y": Y}, **HEALTHY_LINE),
    ]


def _fit(series: Series, points: Sequence[Point]) -> list[list[Point]]:
    """Return the two ends of the fit, at the first and the last x, or from 0 with only one; empty without a fit."""
    if series.fit is None or not all(map(math.isfinite, series.fit)):
        return []
    slope, intercept = series.fit
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    return [[(x, intercept + slope * x) for x in (low if low < high else 0.0, high)]]
