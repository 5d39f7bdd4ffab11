"""The first difference between trainer and engine beyond rounding, and the growth of the difference over layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.fields import mapping, mappings, number
from betterhalf.report.markup import Figure, figures, legend, notice, shown, table

COMPARISONS = {
    "trainer_engine": "trainer against engine",
    "prefill_decode": "prefill against decode",
    "batch": "two batch sizes",
}
"""Comparison -> words for it; also the order of styles."""

_WORST = 12


def localize_part(prefix: str, localize: Mapping[str, Any]) -> str:
    """Return sentences, the growth by layer, and the operations closest to their bounds; empty without data."""
    if not localize:
        return ""
    growth = _growth(prefix, mappings(localize, "growth"))
    return _sentences(localize) + figures([growth] if growth else []) + _operations(mappings(localize, "operations"))


def _sentences(localize: Mapping[str, Any]) -> str:
    dtype = str(localize.get("dtype") or "?")
    first = mapping(localize, "first")
    if first:
        lead = notice(f"In {dtype}, trainer and engine first differ by more than rounding at {_place(first)}.")
    else:
        lead = f"<p>In {escape(dtype)}, trainer and engine differ by no more than rounding in every operation.</p>"
    comparisons = mapping(localize, "comparisons")
    others = [(words, mapping(comparisons, key)) for key, words in COMPARISONS.items() if key in comparisons]
    items = "".join(f"<li>{escape(words)}: {escape(_comparison(found))}</li>" for words, found in others)
    return lead + (f"<ul>{items}</ul>" if items else "")


def _comparison(found: Mapping[str, Any]) -> str:
    """Describe a comparison, which holds its first divergence under `first`, or is that divergence itself."""
    first = mapping(found, "first") if "first" in found else found
    return f"first at {_place(first)}" if first.get("operation") else "no difference beyond rounding"


def _place(first: Mapping[str, Any]) -> str:
    layer = number(first.get("layer"))
    where = f"layer {layer:.0f}, " if layer == layer else ""  # NaN is not equal to itself: outside the layers
    size = f"difference {shown(number(first.get('difference')))}, bound {shown(number(first.get('bound')))}"
    return f"{where}{first.get('operation')} ({size})"


def _growth(prefix: str, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    layers = [number(row.get("layer")) for row in rows]
    series = tuple(
        Series(
            name=words,
            style=style,
            points=[(layer, number(row.get(key))) for layer, row in zip(layers, rows, strict=True)],
        )
        for style, (key, words) in enumerate(COMPARISONS.items())
    )
    image = draw(
        Chart(
            key=f"{prefix}growth",
            title="Growth of the difference by layer (relative)",
            series=series,
            across="layer",
            across_ticks=tuple((layer, f"{layer:g}") for layer in layers if math.isfinite(layer)),
            scale="log10",
        )
    )
    if image is None:
        return None
    return Figure(
        key=f"{prefix}growth",
        title="Growth by layer",
        unit="relative difference of the layer outputs",
        image=image,
        legend=legend((style, escape(words)) for style, words in enumerate(COMPARISONS.values())),
        caption="Healthy: starts at the rounding error of the format, and grows slowly and smoothly. A jump marks the "
        "layer to examine. Layers where two computations agree bit for bit have no mark: the axis is logarithmic.",
        numbers=_growth_table(rows),
    )


def _growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [shown(number(row.get("layer")), ".0f"), *(shown(number(row.get(key))) for key in COMPARISONS)] for row in rows
    ]
    return table(["layer", *COMPARISONS.values()], cells)


def _operations(rows: Sequence[Mapping[str, Any]]) -> str:
    worst = sorted(rows, key=_excess, reverse=True)[:_WORST]
    if not worst:
        return ""
    cells = [
        [
            str(row.get("operation")),
            shown(number(row.get("layer")), ".0f"),
            *(shown(number(row.get(key))) for key in ("local", "bound")),
            shown(_excess(row), ".2f"),
        ]
        for row in worst
    ]
    return table(["operation (closest to its bound first)", "layer", "local difference", "bound", "ratio"], cells)


def _excess(row: Mapping[str, Any]) -> float:
    """Return difference / bound; -1, which sorts last, if either is missing."""
    local, bound = number(row.get("local")), number(row.get("bound"))
    return local / bound if bound > 0 and local == local else -1.0
