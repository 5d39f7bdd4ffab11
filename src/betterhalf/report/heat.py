"""The mismatch matrix as a table whose cells are shaded by k3; every cell also shows the number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from betterhalf.report.markup import header_row, note, scroll
from betterhalf.report.pairs import Pair, dtypes

_EDGES = (1e-9, 1e-7, 1e-5, 1e-3)
"""Values of k3 at which the shade changes; the last is the bound of its healthy band."""
_SHADES = ("below 1e-9", "below 1e-7", "below 1e-5", "below 1e-3", "1e-3 and above: outside the healthy band")


def heat_table(pairs: Sequence[Pair], confidence: float = math.nan) -> str:
    """Return the pairs by trainer dtype (rows) and rollout dtype (columns), or as one row if all are matched."""
    if not pairs:
        return ""
    rollouts = dtypes([pair.rollout for pair in pairs])
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(row.get(rollout)) for rollout in rollouts)}</tr>'
        for name, row in _rows(pairs)
    )
    level = f"{100 * confidence:g}% confidence interval" if math.isfinite(confidence) else "confidence interval"
    sides = "Rows: precision of the trainer (pi); columns: precision of the rollout engine (mu)."
    if all(pair.train == pair.rollout for pair in pairs):
        sides = "Trainer (pi) and rollout engine (mu) have the same precision."
    lead = note(f"Mismatch k3 in nats per token, with its {level}. {sides}")
    matrix = f"<table class=heat>{header_row(['', *rollouts])}{rows}</table>"
    return lead + scroll(matrix, "mismatch k3, trainer by rollout precision") + _key()


def shade(k3: float) -> int:
    """Return the shade, 0 to 4: the number of edges that k3 has reached."""
    return sum(k3 >= edge for edge in _EDGES)


def _rows(pairs: Sequence[Pair]) -> list[tuple[str, dict[str, Pair]]]:
    """Return the name of each row, and its pairs by rollout dtype."""
    if all(pair.train == pair.rollout for pair in pairs):
        return [("matched", {pair.rollout: pair for pair in pairs})]
    trains = dtypes([pair.train for pair in pairs])
    return [(train, {pair.rollout: pair for pair in pairs if pair.train == train}) for train in trains]


def _cell(pair: Pair | None) -> str:
    if pair is None:
        return '<td class="none">not measured</td>'
    if pair.error:
        return f'<td class="none">failed<small>{escape(pair.error)}</small></td>'
    low, high = pair.interval
    interval = f"{low:.1e} to {high:.1e}" if math.isfinite(low) and math.isfinite(high) else escape(pair.no_interval)
    same = " same" if pair.train == pair.rollout else ""
    return f'<td class="h{shade(pair.k3)}{same}"><b>{pair.k3:.2e}</b><small>{interval}</small></td>'


def _key() -> str:
    items = "".join(f'<li><i class="h{index}"></i>{escape(text)}</li>' for index, text in enumerate(_SHADES))
    return f'<ul class="legend heatkey">{items}<li><i class="same"></i>same precision on both sides</li></ul>'
