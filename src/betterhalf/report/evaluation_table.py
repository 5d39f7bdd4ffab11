"""The results of an evaluation as rows of text, for the terminal and for the page."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from betterhalf.report.fields import mapping, number

_COUNTS = (("prompts", "prompts", ".0f"), ("truncated", "truncated_fraction", ".3f"), ("length", "mean_length", ".1f"))
"""Further rows: heading, key and format."""


_KINDS = ("avg", "pass", "maj")
_MEASURE = re.compile(rf"({'|'.join(_KINDS)})@([1-9][0-9]{{0,5}})")


def measures(summary: Mapping[str, Any]) -> list[str]:
    """Return the names of the measures of all data sets: avg@k, then pass@k and maj@k by k."""
    names = dict.fromkeys(name for found in sets_of(summary).values() for name in found if _MEASURE.fullmatch(name))
    return sorted(names, key=lambda name: (_KINDS.index(name.partition("@")[0]), k_of(name)))


def k_of(measure: str) -> int:
    """Return the k of `pass@k`."""
    return int(measure.partition("@")[2])


def sets_of(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the results of each data set."""
    data = mapping(summary, "data")
    return {name: mapping(data, name) for name in data}


def evaluation_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table: a row for each measure, a column for each data set."""
    found = sets_of(summary)
    rows = [[name, *(_with_interval(one, name) for one in found.values())] for name in measures(summary)]
    rows += [
        [heading, *(_cell(number(one.get(key)), spec) for one in found.values())] for heading, key, spec in _COUNTS
    ]
    return ["", *found], rows + _gap_rows(found)


def _gap_rows(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the deployment gap; none if no data set has one."""
    gaps = [mapping(one, "deployment_gap") for one in found.values()]
    if not any(gaps):
        return []
    lines: tuple[tuple[str, str], ...] = (("engine (mu)", "accuracy"), ("trainer (pi)", "trainer_accuracy"))
    rows = [[heading, *(_cell(number(gap.get(key)), ".3f") for gap in gaps)] for heading, key in lines]
    return [
        *rows,
        ["gap, pi - mu", *(_bounded(number(gap.get("gap")), gap.get("interval"), "+.4f") for gap in gaps)],
        ["effective sample", *(_ess(gap) for gap in gaps)],
    ]


def _ess(gap: Mapping[str, Any]) -> str:
    shown = _cell(number(gap.get("ess_fraction")), ".3f")
    return shown if gap.get("reliable", True) else f"{shown}, not reliable"


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    return _bounded(number(found.get(name)), mapping(found, "intervals").get(name), ".3f")


def _bounded(value: float, interval: object, spec: str) -> str:
    """Return a value with its interval, if there is one."""
    if not isinstance(interval, Sequence) or len(interval) != 2:
        return _cell(value, spec)
    low, high = (number(bound) for bound in interval)
    bounds = "" if math.isnan(low) or math.isnan(high) else f" [{low:{spec}}, {high:{spec}}]"
    return _cell(value, spec) + bounds


def _cell(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"


def print_evaluation(summary: Mapping[str, Any], stream: TextIO | None = None, *, width: int = 120) -> None:
    """Print the table, on standard output if `stream` is absent."""
    head, rows = evaluation_rows(summary)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for place, column in enumerate(head):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=stream or sys.stdout, width=width, highlight=False).print(table)
