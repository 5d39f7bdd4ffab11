"""Terminal view of the doctor's results: verdicts, headroom, mismatch, and a configuration to paste."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"ok": "bold green", "watch": "bold yellow", "unsafe": "bold red"}
_BACKWARD = ("backward", "gradient")
_KIND_WORDS = {
    "input": "input",
    "forward": "output",
    "backward": "gradient of output",
    "weight": "weight",
    "gradient": "weight gradient",
}
_ROWS = 4
"""Rows of the census shown for each direction; `doctor.json` and the page have all."""


def show_doctor(result: Mapping[str, Any], stream: TextIO | None = None, *, width: int = 100) -> None:
    """Print a doctor's result, on standard output if `stream` is None; what was not measured is left out."""
    out = Console(file=stream or sys.stdout, width=width, highlight=False)
    agreement = result.get("engine_agrees")
    if agreement:
        style = "" if agreement["agrees"] else "bold red"
        out.print(Text(f"engine and trainer  {'agree' if agreement['agrees'] else 'DISAGREE'}", style=style))
        _print_indented(out, str(agreement["reason"]))
    _print_verdicts(out, result.get("verdicts") or {})
    _print_census(out, result.get("census") or {})
    _print_mismatch(out, result.get("mismatch") or [])
    if why := result.get("mismatch_not_measured"):
        out.print(Text("\nThe mismatch of trainer and engine was not measured:"))
        _print_indented(out, why)
        out.print()
    islands = result.get("islands")
    if islands:
        word = "solve the problem" if islands["cures"] else "do not solve the problem"
        out.print(Text(f"FP32 islands {word}:"))
        _print_indented(out, islands["reason"])
    if result.get("not_trained"):
        out.print(Text("\nNo precision is recommended: betterhalf cannot train this model.", style="bold"))
    elif result.get("recommended"):
        out.print(Text(f"\nRecommended: {result['recommended']}", style="bold"))
        # Not wrapped: the text is for pasting.
        print(result.get("config", ""), file=out.file)


def _print_verdicts(out: Console, verdicts: Mapping[str, Any]) -> None:
    for name, verdict in verdicts.items():
        word = str(verdict["verdict"])
        out.print(Text.assemble("\n", (f"{name}  {word}", _STYLES.get(word, ""))))
        for reason in verdict["reasons"]:
            _print_indented(out, reason)
        if verdict["modules"]:
            _print_indented(out, f"Modules: {', '.join(verdict['modules'])}.")


def _print_indented(out: Console, text: str) -> None:
    for line in textwrap.wrap(text, out.width - 2, break_long_words=False, break_on_hyphens=False):
        out.print(Text(f"  {line}"))


def _print_census(out: Console, census: Mapping[str, Any]) -> None:
    """Print the least headroom, in both directions, of the first census, which is that of the narrowest format."""
    if not census:
        return
    name, found = next(iter(census.items()))
    table = _table(
        f"Least headroom in {name}, backward at loss scale 1", ("module", "values", "largest", "bits", "lost")
    )
    for backward in (False, True):
        for row in _lowest(found["modules"], backward=backward):
            lost = f"{100 * (row['subnormal_fraction'] + row['zero_fraction']):.1f}%"
            cells = (row["module"], _KIND_WORDS[row["kind"]], _number(row["max_abs"], ".3g"))
            table.add_row(*cells, _number(row["headroom_bits"], ".1f"), lost)
    out.print()
    out.print(table)
    out.print(Text("lost: share of the non-zero values that are subnormal or zero in this format."))


def _lowest(rows: Sequence[Mapping[str, Any]], *, backward: bool) -> list[Mapping[str, Any]]:
    """Return the rows of one direction with the least headroom, one for each module."""
    directed = [row for row in rows if (row["kind"] in _BACKWARD) == backward and _is_number(row["headroom_bits"])]
    lowest: dict[str, Mapping[str, Any]] = {}
    for row in sorted(directed, key=lambda row: row["headroom_bits"]):
        lowest.setdefault(row["module"], row)
    return list(lowest.values())[:_ROWS]


def _print_mismatch(out: Console, pairs: Iterable[Mapping[str, Any]]) -> None:
    table = _table("Mismatch of the matched pairs", ("pair", "k3", "largest |pi - mu|", "tokens"))
    for pair in pairs:
        name = f"{pair['train']}/{pair['rollout']}"
        if pair.get("error"):
            table.add_row(name, "failed", "-", "-")
            continue
        low, high = pair["k3_ci"]
        k3 = f"{_number(pair['k3'], '.2e')}  [{_number(low, '.1e')}, {_number(high, '.1e')}]"
        table.add_row(name, k3, _number(pair["max_abs"], ".2e"), str(pair["tokens"]))
    if table.row_count:
        out.print()
        out.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _number(value: object, spec: str) -> str:
    return format(value, spec) if _is_number(value) else "-"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)
