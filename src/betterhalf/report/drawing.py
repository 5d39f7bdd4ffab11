"""A figure as a Vega-Lite specification with its data, and its three outputs: on the page, as SVG, as PNG.

Colours are the variables of the page's style sheet, so that one drawing works on light and dark pages; a file for a
paper gets the light ones. Data travel as columns, which are a third of the size of rows.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from betterhalf.errors import InputError
from betterhalf.report.style import STYLE

STYLES = 8
"""Distinct colours; series beyond that reuse them."""
HEIGHT = 200
"""Height of the plot area in pixels."""
PAPER_WIDTH, PAPER_WIDE = 420, 760
"""Width in pixels of a figure in a file of its own, and of one that is drawn across the page."""

_PNG_SCALE = 3.0
_FONT = "system-ui, Helvetica, Arial, sans-serif"

_OPENED = '<script type="application/json" class=figure>'
_ON_PAGE = ("key", "title", "unit", "spec", "tables", "names", "wide")
"""Fields of a drawing that the page's script and `drawings_of` read."""

Json = dict[str, Any]
"""Part of a specification of Vega-Lite."""

Columns = Mapping[str, Any]
"""Part of a table: lists are columns, other values are the same in each row."""
Table = Sequence[Columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure without the text around it."""

    key: str
    """Unique on the page; part of element ids, and the name of the figure's files."""
    title: str
    """Name for screen readers."""
    description: str
    """The figure in words, for screen readers."""
    unit: str = ""
    """Title of the vertical axis in a file of its own; the page says it above the figure."""
    spec: Json
    """Vega-Lite specification without data."""
    tables: Mapping[str, Table]
    """Name of each table in `spec` -> its data."""
    names: Mapping[str, str]
    """Series, as `style` or `style.part` -> its name: on hover, and in the legend of a file of its own."""
    wide: bool = False
    """Draw across the page."""

    def html(self) -> str:
        """Return the place of the figure on the page, with what the page's script needs to draw it."""
        content = {name: getattr(self, name) for name in _ON_PAGE}
        return (
            f'<div class="chart{" wide" if self.wide else ""}" role="img" aria-labelledby="{self.key}-t {self.key}-d">'
            f'</div><p id="{self.key}-t" hidden>{escape(self.title)}</p>'
            f'<p id="{self.key}-d" hidden>{escape(self.description)}</p>'
            f"{_OPENED}{inert_json(content)}</script>"
        )

    def svg(self, *, paper: bool = True) -> str:
        """Return the figure as SVG: with a legend and fixed colours for a paper, or in the colours of the page."""
        import vl_convert

        return str(vl_convert.vegalite_to_svg(self._whole(paper=paper)))

    def png(self) -> bytes:
        """Return the figure as PNG on a white ground, three pixels for one of the SVG."""
        import vl_convert

        whole = self._whole(paper=True) | {"background": "#ffffff"}
        return bytes(vl_convert.vegalite_to_png(whole, scale=_PNG_SCALE))

    def _whole(self, *, paper: bool) -> dict[str, Any]:
        """Return the specification with data, width and theme."""
        width = PAPER_WIDE if self.wide else PAPER_WIDTH
        whole = {**copy.deepcopy(self.spec), "config": theme(), "width": width, "autosize": {"type": "pad"}}
        if paper:
            _name_within(whole, self.unit, {int(float(key)): name for key, name in reversed(list(self.names.items()))})
        text = json.dumps(whole, allow_nan=False)
        colored = re.sub(r"var\(--(\w+)\)", lambda found: _light()[found[1]], text) if paper else text
        found: Json = json.loads(colored)
        return found | {"datasets": {name: _rows(table) for name, table in self.tables.items()}}


def theme() -> Json:
    """Return Vega's configuration."""
    text = {"font": _FONT, "fontSize": 12}
    label = {"labelColor": "var(--soft)", "labelFont": _FONT, "labelFontSize": 12}
    title = {"titleColor": "var(--soft)", "titleFont": _FONT, "titleFontSize": 12, "titleFontWeight": "normal"}
    lines = {"domainColor": "var(--soft)", "tickColor": "var(--soft)", "gridColor": "var(--rule)"}
    legend = {"labelFont": _FONT, "labelFontSize": 12, "labelColor": "var(--ink)", "labelLimit": 0, "title": None}
    return {
        "mark": {"aria": False},
        "background": "transparent",
        "view": {"stroke": None},
        "axis": {**label, **title, **lines, "labelOverlap": True, "aria": False},
        "axisX": {"grid": False, "titleAnchor": "end"},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 7},
        "legend": {**legend, "orient": "bottom", "columns": 4, "symbolType": "stroke", "symbolStrokeWidth": 2},
        "text": {"color": "var(--ink)", **text},
    }


def _name_within(whole: Json, unit: str, names: Mapping[int, str]) -> None:
    """Give the specification of a paper's figure what the page says around it: the unit, and a legend of series."""
    for each in whole["layer"]:
        channels = each["encoding"]
        if channels.get("y", {}).get("field") == "y":
            channels["y"]["title"] = unit
        color = channels.get("color", {})
        if color.get("field") == "a" and len(color["scale"]["domain"]) > 1:
            shown = [names.get(style, "") for style in color["scale"]["domain"]]
            place = f"indexof({color['scale']['domain']}, datum.value)"
            color["legend"] = {"labelExpr": f"({json.dumps(shown)})[{place}]"}


def series_columns(points: Iterable[tuple[float, float]], **constants: object) -> dict[str, Any]:
    """Return the columns `x` and `y` of points, to five digits; a missing number is null, which breaks a line."""
    pairs = list(points)
    columns = {"x": [_short(x) for x, _ in pairs], "y": [_short(y) for _, y in pairs]}
    return {**constants, **columns}


def inert_json(content: object) -> str:
    """Return JSON for a `<script>` element, with no character that could end it or open another."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def drawings_of(page: str) -> list[Drawing]:
    """Return the figures of a page, which holds the specification and the data of each."""
    texts = re.findall(re.escape(_OPENED) + "(.*?)</script>", page)
    return [Drawing(description="", **json.loads(text)) for text in texts]


def write_figures(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
    """Write each figure as `KEY.svg` and `KEY.png` into a folder, and return the paths.

    Raises:
        InputError: the folder cannot be made or written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            svg, png = (folder / f"{drawing.key}.{kind}" for kind in ("svg", "png"))
            svg.write_text(drawing.svg() + "\n", encoding="utf-8")
            png.write_bytes(drawing.png())
            written += [svg, png]
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}). Choose another folder with --figures DIR."
        ) from error
    return written


def _rows(table: Table) -> list[dict[str, object]]:
    """Return the rows of a table."""
    rows = []
    for part in table:
        lists = {key: value for key, value in part.items() if isinstance(value, list)}
        constants = {key: value for key, value in part.items() if key not in lists}
        rows += [{**constants, **dict(zip(lists, cells, strict=True))} for cells in zip(*lists.values(), strict=True)]
    return rows


def _short(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.5g}") if abs(value) < 1e5 or not float(value).is_integer() else value
    return int(short) if float(short).is_integer() and abs(short) < 1e15 else short


@cache
def _light() -> dict[str, str]:
    """Return the light colours of the style sheet by the names of their variables."""
    return dict(re.findall(r"--(\w+):(#\w+)", STYLE.partition("@media")[0]))
