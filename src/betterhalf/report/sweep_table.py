"""The results of a sweep as rows of text, for the terminal and for the page."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from betterhalf.report.emulated import emulated_sentence
from betterhalf.report.fields import mapping, mappings, number, texts
from betterhalf.types import EmulatedDtype

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number of a run, and of a combination as the mean over its seeds."""

    key: str
    """Key in `results.jsonl`."""
    heading: str
    """Heading of its column."""
    spec: str
    """Format of the number."""
    positive: bool = False
    """True if means over seeds are geometric, and the interval is on the logarithmic scale."""
    share: bool = False
    """True for a number between 0 and 1, whose interval ends there."""
    brief: bool = False
    """Show it on the terminal as well."""


MEASURES = (
    Measure(key="reward_final", heading="final reward", spec=".3f", share=True, brief=True),
    Measure(key="accuracy", heading="accuracy", spec=".3f", share=True, brief=True),
    Measure(key="reward_first", heading="first", spec=".3f", share=True),
    Measure(key="reward_best", heading="best", spec=".3f", share=True),
    Measure(key="reward_lowest", heading="lowest", spec=".3f", share=True),
    Measure(key="k3_first", heading="k3 first", spec=".1e", positive=True, brief=True),
    Measure(key="k3_max", heading="k3 max", spec=".1e", positive=True),
    Measure(key="k3_final", heading="k3 final", spec=".1e", positive=True),
    Measure(key="exponent_first", heading="x first", spec=".1e", positive=True),
    Measure(key="exponent_max", heading="x max", spec=".1e", positive=True),
    Measure(key="grad_norm_max", heading="max grad norm", spec=".1e", positive=True),
    Measure(key="ratio_max_negative", heading="max ratio (A < 0)", spec=".1e", positive=True, brief=True),
    Measure(key="accident_fraction", heading="accidents", spec=".1e", positive=True),
    Measure(key="skipped", heading="skipped", spec=".3g"),
    Measure(key="seconds", heading="seconds", spec=".0f"),
)
"""Every number of a run, in the order of the table."""

_WITH_INTERVAL = ("reward_final", "accuracy")
"""Measures shown with their interval in the table; on the terminal, the first."""


def combination_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of `results.jsonl` that describe a combination."""
    return [row for row in rows if row.get("kind") == "combination"]


def cell_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of `results.jsonl` that describe a single run."""
    return [row for row in rows if row.get("kind") == "cell"]


def head_of(rows: Sequence[Row]) -> Row:
    """Return the row that describes the sweep; empty if it is missing."""
    return next((row for row in rows if row.get("kind") == "sweep"), {})


def table_text(rows: Sequence[Row], *, brief: bool) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table by combination; measures that no run has are left out.

    Args:
        rows: rows of `results.jsonl`.
        brief: only the columns that fit on a terminal.
    """
    combinations, axes = combination_rows(rows), axis_names(rows)
    shown, with_interval = _shown(rows, brief=brief), _WITH_INTERVAL[: 1 if brief else None]
    head = [*(axes or ["combination"]), "n", "outcome", *(_heading(measure, rows) for measure in shown)]
    body = [
        [
            *([axis_text(row, name) for name in axes] or ["all"]),
            str(row.get("n", "-")),
            outcome_text(row),
            *(
                _mean_text(mapping(row, measure.key), measure, interval=measure.key in with_interval)
                for measure in shown
            ),
        ]
        for row in combinations
    ]
    return head, body


def _shown(rows: Sequence[Row], *, brief: bool) -> list[Measure]:
    """Return the measures that the table has."""
    combinations = combination_rows(rows)
    return [
        measure
        for measure in MEASURES
        if (measure.brief or not brief) and any(mapping(row, measure.key) for row in combinations)
    ]


def explanation(rows: Sequence[Row], *, brief: bool) -> str:
    """Return the caption of the table: the kinds of its means and intervals."""
    logarithmic = [measure.heading for measure in _shown(rows, brief=brief) if measure.positive]
    means = "Means over seeds; in brackets the 95% interval by Student's t, which a single seed does not have."
    if not logarithmic:
        return means
    listed = " and ".join([", ".join(logarithmic[:-1]), logarithmic[-1]] if len(logarithmic) > 1 else logarithmic)
    return f"{means} Averaged on the logarithmic scale, unless one of the values is 0: {listed}."


def _heading(measure: Measure, rows: Sequence[Row]) -> str:
    engine = head_of(rows).get("evaluate")
    return f"{measure.heading} ({engine})" if measure.key == "accuracy" and engine else measure.heading


def axis_names(rows: Sequence[Row]) -> list[str]:
    """Return the names of the axes, without the seed."""
    return [str(axis.get("name")) for axis in mappings(head_of(rows), "axes")]


def axis_text(row: Row, axis: str) -> str:
    """Return the value of an axis; a format that is emulated says so."""
    value = str(mapping(row, "point").get(axis, "-"))
    return f"{value} (emulated)" if value in texts(row, "emulated") else value


def outcome_text(row: Row) -> str:
    """Return the outcomes of the seeds, such as `learned` or `2 learned, 1 dips`."""
    counts = {str(word): count for word, count in mapping(row, "outcomes").items()}
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "-"


def _mean_text(value: Row, measure: Measure, *, interval: bool) -> str:
    """Return a mean, with its interval if there is one and it is wanted; a dash if nothing was measured."""
    mean, low, high = (number(value.get(key)) for key in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return "-"
    text = format(mean, measure.spec)
    if interval and math.isfinite(low):
        text += f" [{low:{measure.spec}}, {high:{measure.spec}}]"
    return text


def emulated_names(rows: Sequence[Row]) -> set[str]:
    """Return the emulated formats of a sweep's runs and of its evaluation."""
    evaluation = {name for name in get_args(EmulatedDtype) if name == head_of(rows).get("evaluate")}
    return evaluation | {name for row in cell_rows(rows) for name in texts(row, "emulated")}


def print_sweep(rows: Sequence[Row], stream: TextIO | None = None) -> None:
    """Print the table by combination on standard output, or on `stream`, as wide as it needs to be."""
    head, body = table_text(rows, brief=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    words = len(axis_names(rows) or ["all"]) + 2
    for index, heading in enumerate(head):
        heading = heading.replace(" (", "\n(")
        table.add_column(heading, justify="left" if index < words and heading != "n" else "right", no_wrap=True)
    for cells in body:
        table.add_row(*map(Text, cells))
    width = max(80, Console(width=1000).measure(table).maximum)
    out = Console(file=stream or sys.stdout, highlight=False, width=width)
    out.print(table)
    for sentence in (explanation(rows, brief=True) if body else "", emulated_sentence(emulated_names(rows))):
        if sentence:
            out.print(Text(sentence))
