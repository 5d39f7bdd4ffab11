"""Building blocks of the page as HTML: sections, tables that scroll in their own box, legends, figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from betterhalf.report.drawing import STYLES, Drawing

_MARKERS = ("M14 6a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "M14 3h6v6h-6z", "M17 2l4 7h-8z", "M17 2l4 4l-4 4l-4-4z")
"""Shapes of the marks of series in a legend, as those of the figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawn figure with the text around it."""

    key: str
    """Unique on the page."""
    title: str
    unit: str
    image: Drawing
    caption: str
    """Content of the figure, and what a healthy run looks like."""
    numbers: str
    """The data of the figure as an HTML table."""
    legend: str = ""
    """`legend` of its series, if the legend of the page does not apply."""


def section(title: str, content: str) -> str:
    """Return a section under a second-level heading; empty without content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def part(title: str, content: str) -> str:
    """Return a part of a section under a third-level heading; empty without content."""
    return f"<h3 class=part>{escape(title)}</h3>{content}" if content else ""


def notice(text: str) -> str:
    """Return a highlighted paragraph for something important."""
    return f"<p class=notice>{escape(text)}</p>"


def note(text: str) -> str:
    """Return an explanation in small print; empty without text."""
    return f"<p class=note>{escape(text)}</p>" if text else ""


def figures(drawn: Iterable[Figure], picture: Callable[[Drawing], str] = Drawing.html) -> str:
    """Return the figures side by side, as many as fit; empty without figures. `picture` gives the HTML of a drawing."""
    shown = "".join(_figure(figure, picture(figure.image)) for figure in drawn)
    return f"<div class=grid-of>{shown}</div>" if shown else ""


def legend(entries: Iterable[tuple[int, str]]) -> str:
    """Return the legend: colour, dash and marker of each (style, name); the name is already HTML.

    The page's script makes each entry a switch of its series.
    """
    items = []
    for style, name in entries:
        swatch = (
            f'<svg viewBox="0 0 34 12" class="{style_class(style)} swatch" aria-hidden="true">'
            f'<path class="line" d="M0 6L34 6"/><path class="m" d="{_MARKERS[style % len(_MARKERS)]}"/></svg>'
        )
        items.append(f'<li data-style="{style}">{swatch}<span>{name}</span></li>')
    return f"<ul class=legend>{''.join(items)}</ul>"


def style_class(index: int) -> str:
    """Return the CSS class of the series at `index`."""
    return f"s{index % STYLES}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: bool = True) -> str:
    """Return a table of plain text in its own box; the first column holds the row headings."""
    kind = "numeric" if numeric else "plain"
    return scroll(f"<table class={kind}>{header_row(head)}{''.join(map(_row, rows))}</table>", head[0] or "table")


def header_row(head: Sequence[str]) -> str:
    """Return the `<tr>` of column headings; an empty one becomes a plain cell."""
    cells = [f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in head]
    return f"<tr>{''.join(cells)}</tr>"


def scroll(content: str, label: str) -> str:
    """Put `content` into a box that scrolls sideways (touch, mouse or keyboard) if it is wider than the page."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def shown(value: float, spec: str = ".3g") -> str:
    """Format `value`; a dash if it is not finite."""
    return format(value, spec) if math.isfinite(value) else "-"


def _row(cells: Sequence[str]) -> str:
    values = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{escape(cells[0])}</th>{values}</tr>'


def _figure(figure: Figure, picture: str) -> str:
    wide = " class=wide" if figure.image.wide else ""
    return (
        f'<figure id="{figure.key}"{wide}><h3>{escape(figure.title)}</h3><p class=unit>{escape(figure.unit)}</p>'
        f"{picture}{figure.legend}<figcaption>{escape(figure.caption)}</figcaption>"
        f"<details><summary>Numbers</summary>{figure.numbers}</details></figure>"
    )
