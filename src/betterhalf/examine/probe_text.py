"""Terminal view of a probe's results: k3 of every pair, every other quantity with its interval, and the seconds."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.emulated import emulated_sentence
from betterhalf.report.pairs import raw_logprobs_sentence

WIDTH = 110
"""Width in columns, unless the terminal is wider."""

_CELL = 26
"""Width of a value with its interval; three of them fit beside the longest name."""

_UNBOUNDED = 10_000
"""Width that no table reaches."""

_EXPECTED_RATIO = 64
"""4^3: FP16 has three more mantissa bits, and k3 grows as the squared rounding error."""

_ROW = (
    ("k3", "k3", ".2e"),
    ("mean |gap|", "mean_abs", ".2e"),
    ("max |gap|", "max_abs", ".2e"),
    ("KL/completion", "sequence_kl", ".2e"),
    ("slope/1k", "slope_per_1k", "+.2e"),
    ("tokens", "tokens", ",d"),
    ("seconds", "seconds", ".1f"),
)
"""Heading, key and format of the columns of the table with a row for each pair."""


def show_probe(result: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print a probe's result, on standard output if `stream` is absent.

    Args:
        result: content of `probe.json`; any key may be missing.
        stream: where to print.
    """
    width = max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    out = Console(file=stream or sys.stdout, width=width, highlight=False)
    pairs = [pair for pair in result.get("pairs", []) if "error" not in pair]
    level = f"{100 * result.get('confidence', 0.95):g}%"
    out.print(Text(_head(result)))
    _print_matrix(out, pairs, level)
    out.print(_rows(pairs))
    for block in _blocks(pairs):
        _print_quantities(out, block, level)
    if result.get("gradient"):
        _print_gradient(out, result["gradient"])
    for sentence in probe_sentences(result):
        out.print(Text(sentence), soft_wrap=True)


def probe_sentences(result: Mapping[str, Any]) -> list[str]:
    """Return sentences on emulated formats, the ratio of the mismatches, the seconds, raw logprobs and failed pairs."""
    pairs = result.get("pairs", [])
    emulated = emulated_sentence(pair[side] for pair in pairs for side in ("train", "rollout"))
    sentences = [emulated, _ratio(result.get("bf16_over_fp16")), _cost(result.get("seconds") or {})]
    sentences += [raw_logprobs_sentence(pair) for pair in pairs]
    failed = [pair for pair in pairs if "error" in pair]
    sentences += [f"{pair['train']}/{pair['rollout']} could not be measured: {pair['error']}" for pair in failed]
    return [sentence for sentence in sentences if sentence]


def _head(result: Mapping[str, Any]) -> str:
    tokens = max((pair.get("tokens", 0) for pair in result.get("pairs", [])), default=0)
    sampled = "from a file" if result.get("engine") == "dump" else f"by the {result.get('engine')} engine"
    return (
        f"{result.get('target')}: {result.get('completions')} completions sampled {sampled}, "
        f"up to {result.get('max_tokens')} tokens each, {tokens:,} in all"
    )


def _print_matrix(out: Console, pairs: Sequence[Mapping[str, Any]], level: str) -> None:
    """Print k3 of each pair: a row for each trainer dtype, a column for each rollout dtype."""
    found = {(pair["train"], pair["rollout"]): pair for pair in pairs}
    trains = list(dict.fromkeys(pair["train"] for pair in pairs))
    notes: list[str] = []

    def cell(train: str, rollout: str) -> Text:
        pair = found.get((train, rollout))
        if not pair:
            return Text("-")
        reason = ((pair.get("metrics") or {}).get("k3/mean") or {}).get("reason")
        low, high = pair["k3_ci"]
        text = _with_interval(pair["k3"], low, high, _noted(notes, reason))
        return Text(text, style="bold" if train == rollout else "")

    columns = {
        f"rollout {rollout}": [cell(train, rollout) for train in trains]
        for rollout in dict.fromkeys(pair["rollout"] for pair in pairs)
    }
    _print_columns(out, f"k3 in nats per token, with its {level} interval", "trainer", trains, columns)
    _print_notes(out, notes)


def _rows(pairs: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("each pair (gap: pi - mu in probability)", "trainer/rollout", [heading for heading, _, _ in _ROW])
    for pair in pairs:
        table.add_row(f"{pair['train']}/{pair['rollout']}", *(_number(pair.get(key), spec) for _, key, spec in _ROW))
    return table


def _blocks(pairs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return groups of pairs that fit side by side: up to three pairs, or those of one rollout dtype."""
    if len(pairs) <= 3:
        return [list(pairs)] if pairs else []
    rollouts = dict.fromkeys(pair["rollout"] for pair in pairs)
    return [[pair for pair in pairs if pair["rollout"] == rollout] for rollout in rollouts]


def _print_quantities(out: Console, pairs: Sequence[Mapping[str, Any]], level: str) -> None:
    """Print every mismatch quantity with its interval."""
    known = (name.removeprefix("mismatch/") for name in CATALOGUE if name.startswith("mismatch/"))
    metrics = [pair.get("metrics") or {} for pair in pairs]
    names = [name for name in known if name != "tokens" and any(name in found for found in metrics)]
    notes: list[str] = []

    def cell(metric: Mapping[str, Any] | None) -> Text:
        if not metric:
            return Text("-")
        mark = _noted(notes, metric.get("reason"))
        return Text(_with_interval(metric["value"], metric.get("low"), metric.get("high"), mark))

    columns = {
        f"{pair['train']}/{pair['rollout']}": [cell(found.get(name)) for name in names]
        for pair, found in zip(pairs, metrics, strict=True)
    }
    _print_columns(out, f"every quantity, with its {level} interval", "mismatch/", names, columns)
    _print_notes(out, notes)


def _print_columns(
    out: Console, title: str, first: str, rows: Sequence[str], columns: Mapping[str, Sequence[Text]]
) -> None:
    """Print a table; if it is too wide, print its last columns in another table below, so that no number is cut off."""
    shown = dict(columns)
    unbounded = out.options.update(width=_UNBOUNDED)
    while len(shown) > 1 and out.measure(_filled(title, first, rows, shown), options=unbounded).maximum > out.width:
        shown.popitem()
    rest = {name: cells for name, cells in columns.items() if name not in shown}
    out.print(_filled(title, first, rows, shown))
    if rest:
        _print_columns(out, title, first, rows, rest)


def _filled(title: str, first: str, rows: Sequence[str], columns: Mapping[str, Sequence[Text]]) -> Table:
    table = _table(title, first, list(columns))
    for index, row in enumerate(rows):
        table.add_row(row, *(cells[index] for cells in columns.values()))
    return table


def _print_gradient(out: Console, gradient: Mapping[str, Any]) -> None:
    """Print the section `gradient`: each trainer against the FP32 trainer, and the effect of sequence weights."""
    columns = ["loss scale", "relative error", "cosine", "zeroed"]
    table = _table("policy gradient, compared with that of the FP32 trainer", "trainer", columns)
    for row in gradient.get("rows", []):
        error = "overflow" if row.get("relative_error") is None else _number(row["relative_error"], ".2%")
        scale, cosine = _number(row.get("loss_scale"), "g"), _number(row.get("cosine"), ".6f")
        table.add_row(row["train"], scale, error, cosine, _number(row.get("zeroed_fraction"), ".2%"))
    out.print(table)
    table = _table("effect of raw sequence weights", "rollout", ["relative change", "cosine", "ESS"])
    for row in gradient.get("weights", []):
        spread = [_number(row.get(key), spec) for key, spec in (("cosine", ".6f"), ("ess_fraction", ".4f"))]
        table.add_row(row["rollout"], _number(row.get("relative_change"), ".2%"), *spread)
    out.print(table)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style=""
    )
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _noted(notes: list[str], reason: str | None) -> str:
    """Return the mark of a note, and add the note if it is new; empty without a reason."""
    if not reason:
        return ""
    if reason not in notes:
        notes.append(reason)
    return f"({notes.index(reason) + 1})"


def _print_notes(out: Console, notes: Sequence[str]) -> None:
    for number, reason in enumerate(notes, start=1):
        out.print(Text(f"({number}) no interval: {reason}"))
    if notes:
        out.print()


def _with_interval(value: float | None, low: float | None, high: float | None, mark: str) -> str:
    """Format a value with its interval, or with the mark of the note that says why there is none.

    Bounds lose a digit if the cell would be too wide.
    """
    if mark:
        return f"{_short(value)} {mark}"
    text = f"{_short(value)} [{_short(low)}, {_short(high)}]"
    return text if len(text) <= _CELL else f"{_short(value)} [{_short(low, digits=1)}, {_short(high, digits=1)}]"


def _short(value: float | None, digits: int = 2) -> str:
    """Format with `digits` significant digits, as in `1.2e-5`; plainly, as in `0.9712`, where that is as short."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.{4 if abs(value) < 10 else 2}f}" if value else "0"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(power)}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def _ratio(ratio: float | None) -> str | None:
    if ratio is None or not math.isfinite(ratio):
        return None
    shown = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return (
        f"k3 ratio BF16 / FP16: {shown}. FP16 has three more mantissa bits, and k3 grows as the squared rounding "
        f"error: expect about {_EXPECTED_RATIO}."
    )


def _cost(seconds: Mapping[str, Any]) -> str | None:
    parts = []
    for phase in ("load", "generate", "score", "gradient", "localize"):
        spent = seconds.get(phase)
        if isinstance(spent, Mapping) and spent:
            parts.append(f"{phase} " + ", ".join(f"{name} {value:.1f}" for name, value in spent.items()))
        elif isinstance(spent, (int, float)) and spent:
            parts.append(f"{phase} {spent:.1f}")
    return f"seconds: {'; '.join(parts)}" if parts else None
