"""Parts of Vega-Lite that figures share: axes, looks of series, healthy band and bounds.

A series has a place `k` in its figure, and a style: its place in the legend, which the page's switches know. The
parameters of a specification are `names` of the series, and `shown`: ends of the vertical axis, which the page's script
fits to the steps that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from betterhalf.report.drawing import HEIGHT, RAISED, STYLES, Json
from betterhalf.report.numbers import Scale, can_draw

Band = tuple[float | None, float | None]

_DASHES = ([1, 0], [7, 3.5], [2, 4], [9, 3, 2, 3], [14, 4], [5, 3, 1, 3, 1, 3], [12, 3, 3, 3, 3, 3], [4, 4])
"""Dash of each style, so that lines differ without colour too."""
_SHAPES = ("circle", "square", "triangle-up", "diamond")
_DOTTED = [1.5, 3.5]
_SCALES: dict[Scale, Json] = {"linear": {"zero": False}, "log10": {"type": "log"}, "log2": {"type": "log", "base": 2}}
X, Y = ({"field": name, "type": "quantitative"} for name in ("x", "y"))
HEALTHY_AREA = {"color": "var(--edge)", "opacity": 0.12}
HEALTHY_LINE = {"color": "var(--edge)", "strokeDash": [2, 3], "strokeWidth": 1.2}
_DECADES = "log(datum.value) / LN10"
_GRID = {"condition": {"test": f"abs({_DECADES} - round({_DECADES})) < 1e-9", "value": 1}, "value": 0}
"""Grid lines of a decimal logarithmic axis: at powers of ten alone."""


def layer(mark: str, table: str, encoding: Json, *filters: str, **look: object) -> Json:
    """Return a layer of marks for the rows of a table that pass the filters."""
    passed = {"transform": [{"filter": each} for each in filters]} if filters else {}
    return {"data": {"name": table}, **passed, "mark": {"type": mark, **look}, "encoding": encoding}


def constant(mark: str, rows: Sequence[Json], encoding: Json, **look: object) -> Json:
    """Return a layer of marks for rows of its own, clipped to the plot."""
    return {"data": {"values": rows}, "mark": {"type": mark, "clip": True, **look}, "encoding": encoding}


def across(title: str, scale: Json, axis: Json) -> Json:
    """Return the channel of the horizontal axis."""
    return {**X, "title": title, "scale": scale if scale.get("type") else {"zero": False, **scale}, "axis": axis}


def upright(scale: Scale) -> Json:
    """Return the channel of the vertical axis, from one end of `shown` to the other."""
    axis: Json = {"tickCount": 5, "grid": True}
    if scale != "linear":
        axis |= {"labelExpr": power_label(scale)} | ({"gridOpacity": _GRID} if scale == "log10" else {})
    return {**Y, "title": None, "scale": _SCALES[scale] | {"domain": {"expr": "shown"}, "nice": True}, "axis": axis}


def layered(
    place: Json,
    layers: Sequence[Json],
    *,
    behind: Sequence[Json] = (),
    parameters: Mapping[str, object] | None = None,
    height: int = HEIGHT,
) -> Json:
    """Return the specification of layers from back to front, as wide as their place on the page.

    Those in front share the channels `place`; what is constant stays apart, since channels of both would be merged.
    """
    return {
        "params": [{"name": name, "value": value} for name, value in (parameters or {}).items()],
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": [*behind, {"encoding": place, "layer": list(layers)}],
    }


def background(scale: Scale, band: Band | None, rules: Sequence[tuple[float, str]]) -> list[Json]:
    """Return the healthy range with dashed edges, and bounds with their names."""
    edges = [edge for edge in band or () if edge is not None and can_draw(scale, edge)]
    sides = [*({"datum": edge} for edge in edges), {"value": 0 if band and band[1] is None else "height"}]
    name = {"x": {"value": "width"}, "y": Y, "text": {"field": "text"}}
    bounds = [{"y": value, "text": text} for value, text in rules]
    return [
        constant("rect", [{}] if edges else [], dict(zip(("y", "y2"), sides, strict=False)), **HEALTHY_AREA),
        constant("rule", [{"y": edge} for edge in edges], {"y": Y}, **HEALTHY_LINE),
        constant("rule", bounds, {"y": Y}, color="var(--wait)", strokeDash=[8, 3], strokeWidth=1.4),
        constant("text", bounds, name, color="var(--wait)", align="right", dx=-4, dy=-7),
    ]


def coloured(styles: Sequence[int], listed: Sequence[int] = (), channel: str = "color") -> Json:
    """Return the channel of the colours of series, with a legend of the `listed` ones in files of their own."""
    return {channel: _by_series([f"var(--s{style % STYLES})" for style in styles], listed)}


def dashed(styles: Sequence[int], listed: Sequence[int], seconds: Sequence[bool]) -> Json:
    """Return the channels of the dashes and widths of lines: `seconds` are thin and dotted."""
    dashes = [_DOTTED if second else _DASHES[style % STYLES] for style, second in zip(styles, seconds, strict=True)]
    widths = _by_series([1.3 if second else 2 for second in seconds]) | {"type": "ordinal"}
    return {"strokeDash": _by_series(dashes, listed), "strokeWidth": widths}


def shaped(styles: Sequence[int]) -> Json:
    """Return the channel of the shapes of markers."""
    return {"shape": _by_series([_SHAPES[style % len(_SHAPES)] for style in styles])}


def band_words(band: Band) -> str:
    """Return the words of a healthy range."""
    low, high = band
    if low is not None and high is not None:
        return f"healthy: {low:g} to {high:g}"
    bound = high if high is not None else low
    return "" if bound is None else f"healthy: {'at most' if low is None else 'at least'} {bound:g}"


def described(name: str, values: Sequence[float], things: str) -> str:
    """Return a sentence on a series for screen readers; empty without a finite value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    ends = f"first {finite[0]:.4g}, last {finite[-1]:.4g}, lowest {min(finite):.4g}, highest {max(finite):.4g}"
    return f"{name}: {len(finite)} {things}, {ends}."


def power_label(scale: Scale) -> str:
    """Return the expression of the label of a power of two, or of a decimal number from 0.001 to 1,000 or a power."""
    if scale == "log2":
        return f"'2' + {RAISED}[round(log(datum.value) / LN2)]"
    digits, power = (f"split(format(datum.value, '~e'), 'e')[{part}]" for part in (0, 1))
    long = f"({digits} == '1' ? '' : {digits} + '\u00b7') + '10' + {RAISED}[toNumber({power})]"
    return f"!datum.label ? '' : abs({_DECADES}) < 3.1 ? format(datum.value, '~g') : {long}"


def _by_series(looks: Sequence[object], listed: Sequence[int] = ()) -> Json:
    """Return a look for each series. Without a legend its domain differs, or it would remove those of others."""
    more = [] if listed else looks[:1]
    scale = {"domain": list(range(len(looks) + len(more))), "range": [*looks, *more]}
    named = {"values": listed, "labelExpr": "names[datum.value]", "symbolType": "stroke"} if len(listed) > 1 else None
    return {"field": "k", "type": "nominal", "scale": scale, "legend": named}
