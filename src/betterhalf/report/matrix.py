"""What a probe found, for the terminal: k3 of every pair, every other quantity with its interval, and the seconds."""

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

WIDTH = 118
"""Columns, unless the terminal is wider."""

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
        result: the content of `probe.json`; anything may be missing.
        stream: where to print.
    """
    width = max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    out = Console(file=stream or sys.stdout, width=width, highlight=False)
    pairs = [pair for pair in result.get("pairs", []) if "error" not in pair]
    level = f"{100 * result.get('confidence', 0.95):g}%"
    out.print(Text(_head(result)))
    out.print(_matrix(pairs, level))
    out.print(_rows(pairs))
    for block in _blocks(pairs):
        out.print(_quantities(block, level))
    if result.get("gradient"):
        _print_gradient(out, result["gradient"])
    for sentence in probe_sentences(result):
        out.print(Text(sentence), soft_wrap=True)


def probe_sentences(result: Mapping[str, Any]) -> list[str]:
    """The ratio of the mismatches, what failed, and the seconds, in plain words."""
    sentences = [_ratio(result.get("bf16_over_fp16")), _cost(result.get("seconds") or {})]
    failed = [pair for pair in result.get("pairs", []) if "error" in pair]
    sentences += [f"{pair['train']}/{pair['rollout']} could not be measured: {pair['error']}" for pair in failed]
    return [sentence for sentence in sentences if sentence]


def _head(result: Mapping[str, Any]) -> str:
    tokens = max((pair.get("tokens", 0) for pair in result.get("pairs", [])), default=0)
    sampled = "from a file" if result.get("engine") == "dump" else f"by the {result.get('engine')} engine"
    return (
        f"{result.get('target')}: {result.get('completions')} completions sampled {sampled}, "
        f"up to {result.get('max_tokens')} tokens each, {tokens:,} in all"
    )


def _matrix(pairs: Sequence[Mapping[str, Any]], level: str) -> Table:
    """k3 of each pair: a row for each trainer dtype, a column for each rollout dtype."""
    rollouts = list(dict.fromkeys(pair["rollout"] for pair in pairs))
    found = {(pair["train"], pair["rollout"]): pair for pair in pairs}
    table = _table(
        f"k3 in nats per token, with its {level} interval", "trainer", [f"rollout {name}" for name in rollouts]
    )
    for train in dict.fromkeys(pair["train"] for pair in pairs):
        cells = [found.get((train, rollout)) for rollout in rollouts]
        style = ["bold" if train == rollout else "" for rollout in rollouts]
        shown = [_with_interval(pair["k3"], *pair["k3_ci"]) if pair else "-" for pair in cells]
        table.add_row(train, *(Text(text, style=mark) for text, mark in zip(shown, style, strict=True)))
    return table


def _rows(pairs: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("each pair (gap: pi - mu in probability)", "trainer/rollout", [heading for heading, _, _ in _ROW])
    for pair in pairs:
        table.add_row(f"{pair['train']}/{pair['rollout']}", *(_number(pair.get(key), spec) for _, key, spec in _ROW))
    return table


def _blocks(pairs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """What fits side by side: up to three pairs, or those of one rollout dtype."""
    if len(pairs) <= 3:
        return [list(pairs)] if pairs else []
    rollouts = dict.fromkeys(pair["rollout"] for pair in pairs)
    return [[pair for pair in pairs if pair["rollout"] == rollout] for rollout in rollouts]


def _quantities(pairs: Sequence[Mapping[str, Any]], level: str) -> Table:
    """Every mismatch quantity with its interval."""
    names = [f"{pair['train']}/{pair['rollout']}" for pair in pairs]
    table = _table(f"every quantity, with its {level} interval", "mismatch/", names)
    for name in (name.removeprefix("mismatch/") for name in CATALOGUE if name.startswith("mismatch/")):
        metrics = [(pair.get("metrics") or {}).get(name) for pair in pairs]
        if name != "tokens" and any(metrics):
            table.add_row(name, *(_with_interval(m["value"], m["low"], m["high"]) if m else "-" for m in metrics))
    return table


def _print_gradient(out: Console, gradient: Mapping[str, Any]) -> None:
    """The section `gradient`: each trainer against the FP32 trainer, and what sequence weights do to the gradient."""
    columns = ["loss scale", "relative error", "cosine", "zeroed"]
    table = _table("policy gradient against that of the FP32 trainer", "trainer", columns)
    for row in gradient.get("rows", []):
        error = "overflow" if row.get("relative_error") is None else _number(row["relative_error"], ".2%")
        scale, cosine = _number(row.get("loss_scale"), "g"), _number(row.get("cosine"), ".6f")
        table.add_row(row["train"], scale, error, cosine, _number(row.get("zeroed_fraction"), ".2%"))
    out.print(table)
    table = _table("with raw sequence weights", "rollout", ["relative change", "cosine", "ESS"])
    for row in gradient.get("weights", []):
        spread = [_number(row.get(key), spec) for key, spec in (("cosine", ".6f"), ("ess_fraction", ".4f"))]
        table.add_row(row["rollout"], _number(row.get("relative_change"), ".2%"), *spread)
    out.print(table)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=title, title_justify="left", title_style="")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    return f"{_short(value)} [{_short(low)}, {_short(high)}]"


def _short(value: float | None) -> str:
    """Two digits: `1.2e-5`; plain where that is as short: `0.9712`."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.4f}" if value else "0"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


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
