"""The page's building blocks as HTML: sections, tables that scroll inside their box, legends, figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from betterhalf.report.canvas import marker, style_class


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawn figure with the text around it."""

    key: str
    """Unique on the page."""
    title: str
    unit: str
    image: str
    """The `<svg>`."""
    caption: str
    """What it shows, and what healthy looks like."""
    numbers: str
    """The same data as an HTML table."""
    legend: str = ""
    """A `legend` of its series, where the page's own does not serve."""


def section(title: str, content: str) -> str:
    """A section under a heading of the second level; nothing when there is no content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def part(title: str, content: str) -> str:
    """A part of a section under a heading of the third level; nothing when there is no content."""
    return f"<h3 class=part>{escape(title)}</h3>{content}" if content else ""


def notice(text: str) -> str:
    """Something the reader must not miss."""
    return f"<p class=notice>{escape(text)}</p>"


def note(text: str) -> str:
    """An explanation in small print."""
    return f"<p class=note>{escape(text)}</p>" if text else ""


def figures(drawn: Iterable[Figure]) -> str:
    """The figures side by side, as many as fit; nothing when there are none."""
    shown = "".join(map(_figure, drawn))
    return f"<div class=grid-of>{shown}</div>" if shown else ""


def legend(entries: Iterable[tuple[int, str]]) -> str:
    """Colour, dash and marker of each series, beside its name (which is HTML already)."""
    items = []
    for style, name in entries:
        swatch = (
            f'<svg viewBox="0 0 34 12" class="{style_class(style)} swatch" aria-hidden="true">'
            f'<path class="line" d="M0 6L34 6"/>{marker(style, 17, 6)}</svg>'
        )
        items.append(f"<li>{swatch}<span>{name}</span></li>")
    return f"<ul class=legend>{''.join(items)}</ul>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: bool = True) -> str:
    """A table of plain text in a box of its own; the first column heads the rows, the others hold numbers or text."""
    kind = "numeric" if numeric else "plain"
    return scroll(f"<table class={kind}>{header_row(head)}{''.join(map(_row, rows))}</table>", head[0] or "table")


def header_row(head: Sequence[str]) -> str:
    """The `<tr>` of column headings; an empty first one is no heading."""
    cells = [f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in head]
    return f"<tr>{''.join(cells)}</tr>"


def scroll(content: str, label: str) -> str:
    """A box that scrolls sideways by finger, mouse or keyboard when `content` is wider than the page."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def shown(value: float, spec: str = ".3g") -> str:
    """`value` for a reader; a dash when it is not finite."""
    return format(value, spec) if math.isfinite(value) else "-"


def _row(cells: Sequence[str]) -> str:
    values = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{escape(cells[0])}</th>{values}</tr>'


def _figure(figure: Figure) -> str:
    return (
        f'<figure id="{figure.key}"><h3>{escape(figure.title)}</h3><p class=unit>{escape(figure.unit)}</p>'
        f"{figure.image}{figure.legend}<figcaption>{escape(figure.caption)}</figcaption>"
        f"<details><summary>Numbers</summary>{figure.numbers}</details></figure>"
    )
