"""Layers of Vega-Lite that figures share: axes, healthy band, bounds; colours, dashes and shapes of series.

A series has a style `a`, its place in the legend. The script of the page leaves out the rows of series that are
switched off and of steps that are not shown, since Vega's interpreter of filters is slow; the parameters `from` and
`to` are the steps to show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from betterhalf.report.drawing import HEIGHT, STYLES, Json
from betterhalf.report.numbers import Scale, can_draw

Band = tuple[float | None, float | None]

_DASHES = ([1, 0], [7, 3.5], [2, 4], [9, 3, 2, 3], [14, 4], [5, 3, 1, 3, 1, 3], [12, 3, 3, 3, 3, 3], [4, 4])
"""Dash of each style, so that lines differ without colour too."""
_SHAPES = ("circle", "square", "triangle-up", "diamond")
_SCALES: Mapping[Scale, Json] = {
    "linear": {"type": "linear", "zero": False},
    "log10": {"type": "log", "base": 10},
    "log2": {"type": "log", "base": 2, "nice": False},
}
_TICKS = 6


def layer(mark: str, table: str, encoding: Json, *filters: str, **look: object) -> Json:
    """Return a layer of marks for the rows of a table that pass the filters."""
    passed = {"transform": [{"filter": each} for each in filters]} if filters else {}
    return {"data": {"name": table}, **passed, "mark": {"type": mark, **look}, "encoding": encoding}


def constant(mark: str, encoding: Json, **look: object) -> Json:
    """Return a layer of one mark, whose channels are expressions or constants: it does not widen the axes."""
    channels = {name: value if isinstance(value, dict) else {"value": value} for name, value in encoding.items()}
    return {"data": {"values": [{}]}, "mark": {"type": mark, **look}, "encoding": channels}


def expression(text: str) -> Json:
    """Return a channel whose value is computed when the figure is drawn."""
    return {"value": {"expr": text}}


def across(title: str, scale: Json, axis: Json) -> Json:
    """Return the channel of the horizontal axis."""
    whole = scale if scale.get("type") == "log" else {"zero": False, **scale}
    return {"field": "x", "type": "quantitative", "title": title, "scale": whole, "axis": axis}


def upright(scale: Scale, ends: tuple[float, float]) -> Json:
    """Return the channel of the vertical axis, which fits the values shown; `ends` are those of all values."""
    axis: Json = {"tickCount": 5}
    if scale != "linear":
        axis = {"values": {"expr": _tick_values(scale, ends)}, "labelExpr": power_label(scale)}
    return {"field": "y", "type": "quantitative", "title": None, "scale": _SCALES[scale], "axis": axis}


def reach_layers(place: Mapping[str, Json], channel: str, values: Iterable[float]) -> list[Json]:
    """Return an invisible layer that makes an axis reach values; none without values."""
    rows = [{channel: value} for value in values]
    other = {"x": "y", "y": "x"}[channel]
    encoding = {channel: place[channel], other: {"value": 0}}
    return [{"data": {"values": rows}, "mark": {"type": "point", "opacity": 0}, "encoding": encoding}] if rows else []


def reached(scale: Scale, ends: tuple[float, float], include: Sequence[float], values: Iterable[float]) -> list[float]:
    """Return what a vertical axis must reach: `include`, or the `ends` of the range around equal values."""
    equal = len({*values, *include}) == 1
    return list(ends) if equal else [value for value in include if can_draw(scale, value)]


def coloured(styles: Iterable[int]) -> Json:
    """Return the channel of the colours of series."""
    return _by_style(styles, [f"var(--s{style})" for style in range(STYLES)])


def dashed(styles: Iterable[int]) -> Json:
    """Return the channel of the dashes of lines."""
    return _by_style(styles, _DASHES)


def shaped(styles: Iterable[int]) -> Json:
    """Return the channel of the shapes of markers."""
    return _by_style(styles, _SHAPES)


def band_layers(band: Band | None, words_at: float | None) -> list[Json]:
    """Return the shaded healthy range with dashed edges, and its words at a value; it does not widen the axis."""
    if band is None:
        return []
    low, high = band
    top = expression("0") if high is None else _inside(high)
    bottom = expression("height") if low is None else _inside(low)
    area = constant(
        "rect", {"x": 0, "x2": expression("width"), "y": top, "y2": bottom}, color="var(--edge)", opacity=0.12
    )
    edges = [_level(bound, "var(--edge)", [2, 3], 1.2) for bound in band if bound is not None]
    words = [] if words_at is None else [_words(words_at, band_words(band), "var(--edge)", "6", "left")]
    return [area, *edges, *words]


def rule_layers(rules: Sequence[tuple[float, str]], *, beside: bool = False) -> list[Json]:
    """Return horizontal lines where the axis reaches them, with names above, or (`beside`) to the right."""
    place, align, dy = ("width + 4", "left", 0) if beside else ("width - 4", "right", -7)
    lines = [_level(value, "var(--wait)", [8, 3], 1.4) for value, _ in rules]
    return [*lines, *(_words(value, text, "var(--wait)", place, align, dy) for value, text in rules)]


def band_words(band: Band) -> str:
    """Return the words of a healthy range."""
    low, high = band
    if low is not None and high is not None:
        return f"healthy: {low:g} to {high:g}"
    bound = high if high is not None else low
    return "" if bound is None else f"healthy: {'at most' if low is None else 'at least'} {bound:g}"


def layered(layers: Sequence[Json], parameters: Mapping[str, object] | None = None, height: int = HEIGHT) -> Json:
    """Return the specification of layers, from back to front, as wide as their place on the page."""
    return {
        "params": [{"name": name, "value": value} for name, value in (parameters or {}).items()],
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": list(layers),
    }


def power_label(scale: Scale) -> str:
    """Return the expression of the label of a power of two, or of a decimal number from 0.001 to 1,000 or a power."""
    base, natural = ("2", "LN2") if scale == "log2" else ("10", "LN10")
    exponent = f"floor(log(datum.value) / {natural} + 1e-9)"
    digits = "'\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079'"
    size = f"format(abs({exponent}), 'd')"
    raised = "".join(
        f" + (length({size}) > {place} ? substring({digits}, toNumber(substring({size}, {place}, {place} + 1)), "
        f"toNumber(substring({size}, {place}, {place} + 1)) + 1) : '')"
        for place in range(3)
    )
    power = f"'{base}' + ({exponent} < 0 ? '\u207b' : ''){raised}"
    if scale == "log2":
        return power
    mantissa = f"round(datum.value / pow(10, {exponent}))"
    long = f"({mantissa} == 1 ? '' : {mantissa} + '\u00b7') + {power}"
    return f"abs({exponent}) <= 3 ? format(datum.value, '~g') : {long}"


def _by_style(styles: Iterable[int], looks: Sequence[object]) -> Json:
    shown = sorted(set(styles))
    scale = {"domain": shown, "range": [looks[style % len(looks)] for style in shown]}
    return {"field": "a", "type": "nominal", "scale": scale, "legend": None}


def _tick_values(scale: Scale, ends: tuple[float, float]) -> str:
    """Return the expression of the ticks: whole powers, and 2 and 5 times them on an axis of less than two decades."""
    base = 2 if scale == "log2" else 10
    first, last = math.floor(math.log(ends[0], base)) - 1, math.ceil(math.log(ends[1], base)) + 1
    stride = max(1, math.ceil((last - first) / _TICKS))
    powers = [float(base) ** power for power in range(first, last + 1) if power % stride == 0]
    if scale == "log2":
        return str(powers)
    fine = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    return f"domain('y')[1] < 100 * domain('y')[0] ? {fine} : {powers}"


def _level(value: float, color: str, dash: Sequence[float], width: float) -> Json:
    places = {"x": 0, "x2": expression("width"), "y": _inside(value), "opacity": expression(_within(value))}
    return constant("rule", places, color=color, strokeDash=dash, strokeWidth=width)


def _words(value: float, text: str, color: str, x: str, align: str, dy: float = 0) -> Json:
    places = {"x": expression(x), "y": _inside(value), "opacity": expression(_within(value)), "text": text}
    return constant("text", places, color=color, align=align, dy=dy, baseline="middle")


def _y(value: float) -> str:
    return f"scale('y', {value!r})"


def _inside(value: float) -> Json:
    """Return the channel of a height, at most at the edge of the plot: what is beyond would widen the figure."""
    return expression(f"clamp({_y(value)}, 0, height)")


def _within(value: float) -> str:
    """Return the expression that is 1 where the axis reaches `value`, and 0 elsewhere."""
    return f"inrange({_y(value)}, [-0.5, height + 0.5]) ? 1 : 0"
