"""Tables of runs side by side, for the terminal and for a notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from betterhalf.report.comparison import changes_text
from betterhalf.report.emulated import emulated_sentence
from betterhalf.report.notebook import figures_html, rows_html
from betterhalf.run_dir import RunDir

Row = Mapping[str, Any]
Differences = Mapping[str, Sequence[Any]]

_COLUMNS = {
    "run": ("name", ""),
    "outcome": ("outcome", ""),
    "test": ("passed", ""),
    "cluster": ("cluster", ""),
    "steps": ("steps", "d"),
    "first": ("first_reward", ".3f"),
    "final reward": ("final_reward", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "mean k3": ("k3", ".1e"),
    "k3 not finite": ("k3_not_finite", "d"),
    "max ratio": ("ratio_max", ".3g"),
    "skipped": ("skipped", "d"),
    "seconds": ("seconds", ".0f"),
}
"""Heading -> (key of a row, format)."""

_OPTIONAL = ("test", "cluster", "accuracy", "k3 not finite")
"""Columns that are left out if no run has a value."""

_SHARED = 12
"""Number of differing settings up to which each run lists its own."""


def comparison_text(runs: Sequence[Row], differences: Differences) -> str:
    """Return the table of runs, then the settings of each run that differ, as plain text."""
    head, body = _cells(runs)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for heading in head:
        left = heading in ("run", "outcome", "test", "cluster")
        table.add_column(heading.replace(" ", "\n"), justify="left" if left else "right", no_wrap=True)
    for cells in body:
        table.add_row(*map(Text, cells))
    out = Console(file=io.StringIO(), width=max(80, Console(width=1000).measure(table).maximum), color_system=None)
    out.print(table)
    lines = [line.rstrip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "\n".join([*lines, *_difference_lines(runs, differences)])


def comparison_html(runs: Sequence[Row], differences: Differences, folders: Sequence[RunDir]) -> str:
    """Return the table of runs, the table of settings that differ, and the figures of all runs."""
    head, body = _cells(runs)
    settings = [[key, *map(_plain, values)] for key, values in differences.items()]
    names = [run["name"] for run in runs]
    shown = rows_html(["setting", *names], settings) if settings else ""
    return rows_html(head, body) + shown + figures_html(folders)


def _cells(runs: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    columns = {
        heading: column
        for heading, column in _COLUMNS.items()
        if heading not in _OPTIONAL or any(run[column[0]] is not None for run in runs)
    }
    return list(columns), [[_cell(run[key], spec) for key, spec in columns.values()] for run in runs]


def _cell(value: object, spec: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "passed" if value else "failed"
    return format(value, spec)


def _difference_lines(runs: Sequence[Row], differences: Differences) -> list[str]:
    if len(runs) < 2:
        return []
    if not differences:
        return ["", "The settings are the same."]
    lines = ["", "Settings that differ:"]
    if len(differences) > _SHARED:
        lines += [f"  {key}: {', '.join(map(_plain, values))}" for key, values in differences.items()]
    else:
        lines += [
            f"  {run['name']}: {changes_text({key: values[place] for key, values in differences.items()})}"
            for place, run in enumerate(runs)
        ]
    sentence = emulated_sentence([value for values in differences.values() for value in values])
    return [*lines, sentence] if sentence else lines


def _plain(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
