"""The outcome of a sanity run as table rows and sentences, for the terminal and for the page."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from betterhalf.report.comparison import changes_text, comparison_sentences, own_table
from betterhalf.report.emulated import emulated_sentence
from betterhalf.report.fields import mapping

COLUMNS = (
    "arm",
    "final accuracy",
    "test",
    "final reward",
    "verdict",
    "mean k3",
    "max |pi-mu|",
    "skipped",
    "seconds",
)
"""Columns of the verdict table."""

_PAGE_ONLY = "max |pi-mu|"
"""Column that the terminal has no room for."""

_STYLES = {
    "passed": "bold green",
    "failed": "bold red",
    "learned": "bold green",
    "dips": "bold yellow",
    "flat": "bold yellow",
    "damaged": "bold yellow",
    "collapsed": "bold red",
    "incomplete": "bold yellow",
}

_BITS = {"fp16": 10, "bf16": 7, "fp32": 23}
"""Stored mantissa bits."""


def verdict_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row of `COLUMNS` for each arm in the summary of a sanity run; missing values are dashes."""
    return [_row(name, arm) for name, arm in _arms(summary).items()]


def verdict_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return sentences on the mismatches, on learning, and on what separates the arms."""
    arms = _arms(summary)
    sentences = []
    if "fp16" in arms and "bf16" in arms:
        sentences.append(_ratio_sentence(summary.get("k3_ratio")))
        sentences.append(_learning_sentence(arms))
    return sentences + comparison_sentences(arms)


def threshold_line(summary: Mapping[str, Any]) -> str:
    """Return the accuracy at which an arm passes the test; empty if the summary does not have it."""
    threshold = summary.get("pass_accuracy")
    if not _is_number(threshold):
        return ""
    return f"test: passed from a final accuracy of {threshold:g} on (sanity.pass_accuracy)."


def possible_formats(summary: Mapping[str, Any]) -> list[object]:
    """Return every name among the arms of a summary and their settings that may be a format."""
    arms = _arms(summary)
    return [*arms, *(value for arm in arms.values() for value in mapping(arm, "changes").values())]


def print_verdict(summary: Mapping[str, Any], stream: TextIO | None = None, *, width: int = 80) -> None:
    """Print the verdict table and its sentences, on standard output if `stream` is absent."""
    out = Console(file=stream or sys.stdout, width=width, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    shown = [place for place, column in enumerate(COLUMNS) if column != _PAGE_ONLY]
    for column in (COLUMNS[place] for place in shown):
        left = column in ("arm", "test", "verdict")
        table.add_column(column.replace("final ", "final\n"), justify="left" if left else "right", no_wrap=True)
    for row in verdict_rows(summary):
        table.add_row(*(Text(row[place], style=_STYLES.get(row[place], "")) for place in shown))
    out.print(table)
    changes = [f"{name}: {text}" for name, text in changes_rows(summary)]
    emulated = emulated_sentence(possible_formats(summary))
    for line in (threshold_line(summary), *changes, *verdict_sentences(summary), emulated):
        if line:
            out.print(Text(line))


def changes_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each arm with the settings that it changes; none if every arm changes its precision only."""
    arms = _arms(summary)
    if not any(own_table(name, arm) for name, arm in arms.items()):
        return []
    return [(name, changes_text(mapping(arm, "changes"))) for name, arm in arms.items()]


def _arms(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the arms of a summary by name; an arm without a result is empty."""
    arms = mapping(summary, "arms")
    return {name: mapping(arms, name) for name in arms}


def _row(name: str, arm: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        _cell(arm.get("final_accuracy"), ".3f"),
        _verdict(arm.get("passed")),
        _cell(arm.get("final_reward"), ".3f"),
        str(arm.get("verdict") or "incomplete"),
        _cell(arm.get("mismatch_k3"), ".2e"),
        _cell(arm.get("mismatch_max_abs"), ".2e"),
        _cell(arm.get("skipped_steps"), "d"),
        _cell(arm.get("seconds"), ".0f"),
    )


def _verdict(passed: object) -> str:
    if passed is None:
        return "incomplete"
    return "passed" if passed else "failed"


def _cell(value: object, spec: str) -> str:
    if not _is_number(value):
        return "-"
    number = float(value)  # type: ignore[arg-type]
    return format(round(number), spec) if spec == "d" else format(number, spec)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _ratio_sentence(ratio: float | None) -> str:
    if ratio is None or not _is_number(ratio):
        return "The k3 ratio could not be computed."
    bits = _BITS["fp16"] - _BITS["bf16"]
    expected = 4**bits
    shown = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return (
        f"k3 ratio BF16 / FP16: {shown}. The mismatch between sampling and training policy is that many times larger "
        f"in BF16. FP16 has {bits} more mantissa bits, and k3 grows as the squared rounding error: expect about "
        f"{expected}."
    )


def _learning_sentence(arms: Mapping[str, Mapping[str, Any]]) -> str:
    fp16, bf16 = arms["fp16"].get("passed"), arms["bf16"].get("passed")
    if fp16 is None or bf16 is None:
        return "An arm is incomplete, so learning cannot be compared."
    if fp16 and bf16:
        return "Both precisions passed the test: here they differ in mismatch, not in learning."
    if fp16:
        return "FP16 passed the test and BF16 did not."
    return "BF16 passed the test and FP16 did not." if bf16 else "Neither FP16 nor BF16 passed the test."
