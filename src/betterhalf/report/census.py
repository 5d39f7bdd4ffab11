"""The range census of `doctor`: headroom by layer and kind, the worst modules, the range of safe loss scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.drawing import Drawing
from betterhalf.report.fields import Point, mappings, number
from betterhalf.report.marks import across, layer, layered, power_label
from betterhalf.report.markup import Figure, legend, shown, table
from betterhalf.report.numbers import superscript

KINDS = ("forward", "input", "backward", "weight", "gradient")
"""Kinds of values measured at a module; also the order of styles."""

_WATCH_BITS = 2.0
"""Headroom below which the doctor's verdict is watch."""
_WORST = 12
_MAX_SCALE = 2.0**24
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One module and kind of the census."""

    module: str
    kind: str
    max_abs: float
    headroom: float
    """Bits to the largest finite value; negative infinity where a value is not finite."""
    subnormal: float
    """Share of the non-zero values that are subnormal."""
    zero: float
    """Share of the non-zero values that round to zero."""
    finite: bool
    """True if all values were finite."""


def read_census(census: Mapping[str, Any]) -> list[Row]:
    """Return the census of one precision, in model order."""
    return [_read(row) for row in mappings(census, "modules")]


def headroom_figure(key: str, dtype: str, rows: Sequence[Row]) -> Figure | None:
    """Draw the least headroom of each layer, one line for each kind; None without a finite number."""
    shapes = _by_layer(rows)
    lines = [(KINDS.index(kind), kind, points) for kind, points in shapes.items() if kind in KINDS and points]
    series = tuple(Series(name=kind, style=style, points=points) for style, kind, points in lines)
    image = draw(
        Chart(
            key=key,
            title=f"Headroom by layer in {dtype} (bits)",
            series=series,
            across="layer",
            across_range=_layer_range(rows),
            across_ticks=tuple((float(n), str(n)) for row in rows if (n := _layer(row.module)) is not None),
            include=(0.0, 4.0),
            rules=((_WATCH_BITS, "watch"), (0.0, "limit")),
        )
    )
    if image is None:
        return None
    overflowing = sum(not row.finite for row in rows)
    lost = f" Entries that are not finite, drawn below the limit: {overflowing}." if overflowing else ""
    return Figure(
        key=key,
        title=f"Headroom, {dtype}",
        unit="bits below the largest finite value, minimum of each layer",
        image=image,
        legend=legend((style, escape(kind)) for style, kind, _ in lines),
        caption="Forward: outputs; backward: gradients with respect to outputs; gradient: weight gradients. Healthy: "
        f"above {_WATCH_BITS:g} bits; below 0 values overflow. Modules before the first layer are drawn to its left, "
        f"modules after the last layer to its right.{lost}",
        numbers=worst_table(rows),
    )


def worst_table(rows: Sequence[Row]) -> str:
    """Return a table of the entries with the least headroom, least first."""
    worst = sorted(rows, key=lambda row: row.headroom)[:_WORST]
    head = ["module", "kind", "largest magnitude", "headroom, bits", "subnormal", "zero", "finite"]
    return table(head, [_cells(row) for row in worst]) if worst else ""


def window_figure(key: str, dtype: str, census: Mapping[str, Any]) -> Figure | None:
    """Draw the range of safe loss scales, and the one in use; None if the census does not hold them."""
    largest, used = number(census.get("largest_safe_loss_scale")), number(census.get("loss_scale"))
    if not largest > 0:
        return None
    with_scale, without = number(census.get("zeroed_fraction")), number(census.get("zeroed_fraction_unscaled"))
    words = f"Scales of 1 to {_scale(largest)} keep every gradient finite; the run starts at {_scale(used)}."
    if largest < 1:
        words = f"No scale of 1 or more keeps the gradients finite; the largest that does is {_scale(largest)}."
    return Figure(
        key=key,
        title=f"Safe loss scales, {dtype}",
        unit="loss scale, powers of two",
        image=_window(key, dtype, words, largest, used),
        caption=f"{words} Gradients that are zero in {dtype} but not in FP32: {shown(with_scale, '.2%')} at the "
        f"largest safe scale, {shown(without, '.2%')} without a loss scale.",
        numbers=table(
            ["", "value"],
            [
                ["largest safe loss scale", _scale(largest)],
                ["loss scale in use", _scale(used)],
                ["zeroed at the largest safe scale", shown(with_scale, ".3%")],
                ["zeroed without a loss scale", shown(without, ".3%")],
            ],
        ),
    )


def _read(row: Mapping[str, Any]) -> Row:
    finite = row.get("finite") is not False
    headroom = number(row.get("headroom_bits"))
    return Row(
        module=str(row.get("module") or "?"),
        kind=str(row.get("kind") or "?"),
        max_abs=number(row.get("max_abs")),
        headroom=headroom if finite and math.isfinite(headroom) else (math.inf if finite else -math.inf),
        subnormal=number(row.get("subnormal_fraction")),
        zero=number(row.get("zero_fraction")),
        finite=finite,
    )


def _cells(row: Row) -> list[str]:
    shares = [shown(share, ".2%") for share in (row.subnormal, row.zero)]
    return [
        row.module,
        row.kind,
        shown(row.max_abs),
        shown(row.headroom, ".1f") if row.finite else "none",
        *shares,
        "yes" if row.finite else "no",
    ]


def _by_layer(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Return kind -> (layer, least headroom), ascending; overflow is placed at -1, below the limit."""
    least: dict[tuple[str, float], float] = {}
    for place, row in zip(_places(rows), rows, strict=True):
        if row.headroom < math.inf:
            value = max(row.headroom, -1.0)
            least[row.kind, place] = min(value, least.get((row.kind, place), math.inf))
    return {kind: sorted((place, low) for (k, place), low in least.items() if k == kind) for kind in KINDS}


def _places(rows: Sequence[Row]) -> list[float]:
    """Return the layer of each row: -1 before the first layer, one more than the last after it."""
    layers = [_layer(row.module) for row in rows]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        return [float(index) for index in range(len(rows))]
    seen, places = False, []
    for place in layers:
        seen = seen or place is not None
        outside = max(numbered) + 1.0 if seen else -1.0
        places.append(outside if place is None else float(place))
    return places


def _layer(module: str) -> int | None:
    found = _LAYER.search(module)
    return int(found.group(1)) if found else None


def _layer_range(rows: Sequence[Row]) -> tuple[float, float]:
    places = _places(rows) or [0.0]
    return min(places) - 0.5, max(places) + 0.5


def _scale(value: float) -> str:
    """Format a loss scale, as a power of two where it is one."""
    exact = value > 0 and math.frexp(value)[0] == 0.5
    return f"2{superscript(math.frexp(value)[1] - 1)}" if exact else shown(value, ".3g")


def _window(key: str, dtype: str, words: str, largest: float, used: float) -> Drawing:
    """Return a bar of the safe scales on an axis of powers of two, and a vertical line at the loss scale in use."""
    scale = {"type": "log", "base": 2, "domain": [min(1.0, largest) / 4, max(_MAX_SCALE, largest)], "nice": False}
    place = {"x": across("loss scale", scale, {"labelExpr": power_label("log2"), "tickCount": 5})}
    layers = [
        layer("bar", "safe", {"x2": {"field": "end"}}, color="var(--edge)", opacity=0.12, height=30),
        layer("text", "safe", {"text": {"value": "safe"}}, align="left", dx=6, color="var(--edge)"),
        layer("rule", "used", {}, color="var(--wait)", strokeWidth=2),
        layer("text", "used", {"text": {"field": "text"}}, y=-8, color="var(--wait)"),
    ]
    tables = {
        "safe": [{"a": 0, "x": [1.0], "end": [largest]}] if largest > 1 else [],
        "used": [{"a": 0, "x": [used], "text": f"used: {_scale(used)}"}] if used > 0 else [],
    }
    title = f"Safe loss scales in {dtype}"
    return Drawing(key=key, title=title, description=words, spec=layered(place, layers, height=50), tables=tables)
