"""Terminal view of `betterhalf probe --localize`: a sentence for each comparison, then a table of layers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_COMPARISONS = {
    "trainer_engine": "trainer and engine",
    "prefill_decode": "the engine's prefill and decoding",
    "batch": "the engine's decoding alone and in a batch",
}
_COLUMNS = ("layer", "trainer / engine", "prefill / decode", "batch")
_SHOWN_LAYERS = 12


def localize_sentences(result: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each comparison, and a hint at the cause for each difference beyond rounding."""
    sentences = []
    for name, label in _COMPARISONS.items():
        sentences += _comparison_sentences(label, result["comparisons"][name])
    return sentences


def show_localize(result: Mapping[str, Any], stream: TextIO | None = None, *, width: int = 100) -> None:
    """Print the object `localize` of probe.json, on standard output if `stream` is absent."""
    out = Console(file=stream or sys.stdout, width=width, highlight=False)
    tokens, prompt = result["tokens"], result["prompt_length"]
    out.print(Text(f"First divergence in {result['dtype']}, one sequence of {prompt} + {tokens - prompt} tokens"))
    for sentence in localize_sentences(result):
        out.print(Text(sentence), soft_wrap=True)
    out.print(_growth_table(result))


def _comparison_sentences(label: str, summary: Mapping[str, Any]) -> list[str]:
    first = summary["first"]
    if first is None:
        return [f"{label}: {_by_rounding(summary['nearest'])}"]
    where = f"{label}: FIRST DIFFERENCE in {_place(first)}, at token {first['token']}"
    if first["not_finite"]:
        return [f"{where}: NaN or infinity in {' and '.join(first['not_finite'])}", f"  {first['hint']}"]
    return [
        f"{where}: {first['difference']:.2e}, where rounding explains at most {first['bound']:.1e}",
        f"  check {first['hint']}",
    ]


def _by_rounding(nearest: Mapping[str, Any] | None) -> str:
    if nearest is None or not nearest["difference"]:
        return "no difference; every operation is bitwise equal"
    share = nearest["difference"] / nearest["bound"]
    return (
        f"differ by rounding alone; {_place(nearest)} comes closest to its bound ({nearest['difference']:.1e}, "
        f"{share:.0%} of it)"
    )


def _place(one: Mapping[str, Any]) -> str:
    layer = "" if one["layer"] is None else f"layer {one['layer']}, "
    return f"{layer}{one['operation']}"


def _growth_table(result: Mapping[str, Any]) -> Table:
    """Return the difference of the residual stream after each layer; of many layers, only every nth and the last."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="difference of the residual stream", title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    rows = result["growth"]
    stride = -(-len(rows) // _SHOWN_LAYERS)
    for row in rows[(len(rows) - 1) % stride :: stride]:
        table.add_row(str(row["layer"]), *(_cell(row[name]) for name in _COMPARISONS))
    return table


def _cell(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
