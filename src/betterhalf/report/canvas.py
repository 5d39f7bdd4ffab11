"""Drawing functions shared by all figures: plot area, grid, healthy band, markers, labels that do not overlap.

Colours come from CSS, so that one drawing works on light and dark pages; each `<svg>` has a title and a description for
screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from betterhalf.report.axis import Axis

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 392, 12, 216
"""Edges of the plot area in pixels of the view box."""

WIDE, WIDE_RIGHT = 880, 736
"""Width and right edge of a figure across the page, with room for whole names at the ends of its lines."""

STYLES = 8
"""Distinct colours; series beyond that reuse them."""

_MAX_POINTS = 800
_NAME_GAP = 13

Point = tuple[float, float]
Band = tuple[float | None, float | None]


def svg(key: str, title: str, description: str, body: str, height: int = HEIGHT, width: int = WIDTH) -> str:
    """Return an accessible `<svg>` around `body`."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>{body}</svg>'
    )


def style_class(index: int) -> str:
    """Return the CSS class of the series at `index`."""
    return f"s{index % STYLES}"


def marker(style: int, x: float, y: float, size: float = 3.2) -> str:
    """Return the marker of the series `style`: a small filled circle, square, triangle or diamond."""
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


def cloud(points: Sequence[Point], style: int) -> str:
    """Return many points as one path of dots, squares, triangles or diamonds, like the markers of the series."""
    shapes = ("h0", "m-1.4 -1.4h2.8v2.8h-2.8z", "m0 -2l1.9 3.2h-3.8z", "m0 -2.1l2.1 2.1l-2.1 2.1l-2.1 -2.1z")
    shape = style % len(shapes)
    path = "".join(f"M{x:.1f} {y:.1f}{shapes[shape]}" for x, y in points)
    return f'<path class="cloud {"dots" if shape == 0 else "open"}" d="{path}"/>'


def line_path(points: Sequence[Point], kind: str) -> str:
    """Return a polyline of CSS class `kind` through `points`, in pixels."""
    moves = "L".join(f"{x:.1f} {y:.1f}" for x, y in thin(list(points)))
    return f'<path class="{kind}" d="M{moves}"/>'


def thin(points: list[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """Reduce to about `limit` points that keep every visible extreme: lowest and highest of each bucket, in order."""
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


def grid(axis: Axis, right: float = RIGHT) -> str:
    """Return horizontal grid lines with their labels."""
    parts = []
    for tick in axis.ticks():
        y = axis.pixel(tick)
        zero = " zero" if tick == 0 else ""
        parts.append(f'<line class="grid{zero}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{axis.label(tick)}</text>')
    return "".join(parts)


def across_labels(ticks: Sequence[tuple[float, str]], name: str, right: float = RIGHT) -> str:
    """Return the horizontal axis, with its ticks, as (pixel, text), and the name of its quantity."""
    parts = [f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{BOTTOM}" y2="{BOTTOM}"/>']
    for x, text in ticks:
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<text class="tick" x="{right}" y="{BOTTOM + 31}" text-anchor="end">{escape(name)}</text>')
    return "".join(parts)


def rules(axis: Axis, bounds: Sequence[tuple[float, str]], *, outside: bool = False) -> str:
    """Return the dashed horizontal lines that the axis reaches, with names above, or (`outside`) beside the plot."""
    reached = [(axis.pixel(value), text) for value, text in bounds if axis.low <= value <= axis.high]
    places = spread([y + (4 if outside else -5) for y, _ in reached], _NAME_GAP, TOP + 4, BOTTOM + 8)
    across = f'x="{RIGHT + 4}"' if outside else f'x="{RIGHT - 4}" text-anchor="end"'
    return "".join(
        f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="rulename" {across} y="{place:.1f}">{escape(text)}</text>'
        for (y, text), place in zip(reached, places, strict=True)
    )


def band_area(band: Band | None, axis: Axis) -> str:
    """Return the shaded healthy range, with dashed edges where the axis extends beyond it."""
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


def band_label(band: Band | None, axis: Axis, occupied: Sequence[float]) -> str:
    """Return the band's label, at the height within it that is furthest from the `occupied` heights of the data."""
    if band is None or not occupied:
        return ""
    top = axis.pixel(axis.high if band[1] is None else band[1]) + 15
    bottom = axis.pixel(axis.low if band[0] is None else band[0]) - 6
    if bottom < top:
        return ""
    heights = [top + (bottom - top) * share / 8 for share in range(9)]
    y = max(heights, key=lambda height: min(abs(height - 4 - other) for other in occupied))
    return f'<text class="bandname" x="{LEFT + 6}" y="{y:.1f}">{escape(_band_words(band))}</text>'


def _band_words(band: Band) -> str:
    low, high = band
    if low is not None and high is not None:
        return f"healthy: {low:g} to {high:g}"
    bound = high if high is not None else low
    return "" if bound is None else f"healthy: {'at most' if low is None else 'at least'} {bound:g}"
