"""A figure as a Vega-Lite specification with its data, and its three outputs: on the page, as SVG, as PNG.

Colours are the variables of the page's style sheet, so that one drawing works on light and dark pages; a file for a
paper gets the light ones. Data travel as columns, which are a third of the size of rows.
"""

from __future__ import annotations

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
from betterhalf.report.library import packed, unpacked
from betterhalf.report.numbers import superscript
from betterhalf.report.style import STYLE

STYLES = 8
"""Distinct colours; series beyond that reuse them."""
HEIGHT = 200
"""Height of the plot area in pixels."""
_BELOW = 40
"""Height in pixels of the axis below the plot area."""
PAPER_WIDTH, PAPER_WIDE = 420, 760
"""Width in pixels of a figure in a file of its own, and of one that is drawn across the page."""
RAISED = "raised"
"""Parameter of every figure: exponent -> its superscript characters."""

_PNG_SCALE = 3.0
_FONT = "system-ui, Helvetica, Arial, sans-serif"

_PACKED = "<script type=text/gzip class=figure>"
_ON_PAGE = ("key", "title", "spec", "tables", "wide")
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
    spec: Json
    """Vega-Lite specification without data."""
    tables: Mapping[str, Table]
    """Name of each table in `spec` -> its data."""
    wide: bool = False
    """Draw across the page."""

    def html(self) -> str:
        """Return the place of the figure on the page, with what the page's script needs to draw it."""
        content = {name: getattr(self, name) for name in _ON_PAGE}
        names = f'role="img" aria-labelledby="{self.key}-t {self.key}-d"'
        return (
            f'<div class=chart {names} style="min-height:{self.spec["height"] + _BELOW}px"></div>'
            f'<p id="{self.key}-t" hidden>{escape(self.title)}</p>'
            f'<p id="{self.key}-d" hidden>{escape(self.description)}</p>'
            f"{_PACKED}{packed(content)}</script>"
        )

    def svg(self, *, paper: bool = True) -> str:
        """Return the figure as SVG: with a legend and fixed colours for a paper, or in the colours of the page."""
        import vl_convert

        return str(vl_convert.vegalite_to_svg(self._whole(paper=paper)))

    def png(self) -> bytes:
        """Return the figure as PNG on a white ground, three pixels for one of the SVG."""
        import vl_convert

        return bytes(vl_convert.vegalite_to_png(self._whole(background="#ffffff"), scale=_PNG_SCALE))

    def _whole(self, *, paper: bool = True, background: str = "transparent") -> str:
        """Return the specification with data, width and theme, as JSON."""
        width = {"width": PAPER_WIDE if self.wide else PAPER_WIDTH, "autosize": {"type": "pad"}}
        data = {"datasets": {name: _rows(table) for name, table in self.tables.items()}}
        whole = {**self.spec, **width, **data, "config": theme(paper=paper), "background": background}
        if not paper:
            return re.sub(r'"legend": {.*?}', '"legend": null', json.dumps(whole, allow_nan=False))
        whole["title"] = {"text": self.title, "subtitle": self.spec.get("title", "")}
        text = json.dumps(whole, allow_nan=False)
        return re.sub(r"var\(--(\w+)\)", lambda found: _light().get(found[1], found[0]), text)


def theme(*, paper: bool = False) -> Json:
    """Return Vega's configuration; in a figure for a paper the words of a healthy range are a subtitle."""
    soft = {"labelColor": "var(--soft)", "titleColor": "var(--soft)", "domainColor": "var(--soft)"}
    sizes = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    heading = {"color": "var(--ink)", "fontWeight": 600} if paper else {"color": "var(--edge)", "fontWeight": "normal"}
    below = {"subtitleColor": "var(--edge)", "subtitleFontSize": 12}
    legend = {"orient": "bottom", "columns": 2, "columnPadding": 24, "labelLimit": 0, "title": None}
    return {
        "params": [{"name": RAISED, "value": {str(power): superscript(power) for power in range(-99, 100)}}],
        "font": _FONT,
        "mark": {"aria": False},
        "background": "transparent",
        "view": {"stroke": None},
        "axis": {**soft, **sizes, "tickColor": "var(--soft)", "gridColor": "var(--rule)", "labelOverlap": True},
        "axisX": {"grid": False, "titleAnchor": "end", "aria": False},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 7, "aria": False},
        "legend": {**legend, **sizes, "labelColor": "var(--ink)"},
        "line": {"strokeCap": "round"},
        "text": {"color": "var(--ink)", "baseline": "middle", "fontSize": 12},
        "title": {"anchor": "start", "frame": "group", "offset": 8, "fontSize": 12, **heading, **below},
    }


def series_columns(points: Iterable[tuple[float, float]], **constants: object) -> dict[str, Any]:
    """Return the columns `x` and `y` of points, to four digits; a missing number is null, which breaks a line."""
    pairs = list(points)
    return {**constants, "x": [_short(x) for x, _ in pairs], "y": [_short(y) for _, y in pairs]}


def drawings_of(page: str) -> list[Drawing]:
    """Return the figures of a page, which holds the specification and the data of each."""
    return [Drawing(description="", **unpacked(text)) for text in re.findall(f"{_PACKED}(.*?)</script>", page)]


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
        rows += [{**part, **dict(zip(lists, cells, strict=True))} for cells in zip(*lists.values(), strict=True)]
    return rows


def _short(value: float) -> float | int | None:
    """Return a whole number as it is, another one to four digits."""
    if not math.isfinite(value):
        return None
    return int(value) if abs(value) < 1e15 and value == int(value) else float(f"{value:.4g}")


@cache
def _light() -> dict[str, str]:
    """Return the light colours of the style sheet by the names of their variables."""
    return dict(re.findall(r"--(\w+):(#\w+)", STYLE.partition("@media")[0]))
