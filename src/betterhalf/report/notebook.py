"""HTML of runs for the output of a notebook cell: a plain table, and figures in a frame with a style of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from betterhalf.report.data import Arm, load
from betterhalf.report.drawing import Drawing
from betterhalf.report.figures import step_figures
from betterhalf.report.markup import figures
from betterhalf.report.style import STYLE
from betterhalf.report.tables import legend
from betterhalf.run_dir import RunDir

_FIGURES = ("reward", "k3")
"""Figures to show, by key; `report` has all."""

_HEIGHT = 430
"""Height of the frame in pixels; it scrolls."""


def facts_html(facts: Mapping[str, object]) -> str:
    """Return a table with a row for each fact; without style, so that every viewer shows it."""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{_text(value)}</td></tr>" for key, value in facts.items())
    return f"<table>{rows}</table>"


def rows_html(head: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table with headings; without style."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def figures_html(runs: Sequence[RunDir]) -> str:
    """Return reward and mismatch of runs in an `<iframe>`, which keeps their style away from the notebook's.

    Empty if no run has recorded a step.

    Raises:
        InputError: a folder is not a run, or a file in it is damaged.
    """
    arms = [arm for arm in load(runs).arms if arm.steps]
    return _frame(_figures(arms)) if arms else ""


def _figures(arms: Sequence[Arm]) -> str:
    drawn, _ = step_figures(arms)
    return (legend(arms) if len(arms) > 1 else "") + figures((one for one in drawn if one.key in _FIGURES), _picture)


def _picture(drawing: Drawing) -> str:
    """Return the figure as SVG: a notebook keeps no megabyte of JavaScript for each cell, and its frame runs none."""
    return f'<div class=chart role="img" aria-label="{escape(drawing.title)}">{drawing.svg(paper=False)}</div>'


def _frame(content: str) -> str:
    page = f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><body>{content}</body>'
    return (
        f'<iframe sandbox srcdoc="{escape(page)}" title="figures" '
        f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
    )


def _text(value: Any) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value))
