"""Figures of a training run's mismatch beyond means: by bin and by completion, over the last quarter of its steps.

The data come from `mismatch.jsonl`, or from the recorded rollouts of a run without that file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from betterhalf.report.bins import Bin, BinSeries, By, bin_figures, pool
from betterhalf.report.data import Arm
from betterhalf.report.fields import Point, mappings, number, points
from betterhalf.report.markup import Figure
from betterhalf.report.sequences import Completions, slope_figure

_PROBABILITY_EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
_BYS: tuple[By, ...] = ("by_position", "by_probability")


def mismatch_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return the figures that have data: the slope, then the bins by position and by probability."""
    groups = [Completions(name=arm.name, style=arm.index, points=completions(arm)) for arm in arms]
    slope = slope_figure("slope", groups, "Completions of the last quarter of the steps.")
    series = {by: [BinSeries(name=arm.name, style=arm.index, bins=bins(arm, by)) for arm in arms] for by in _BYS}
    return [*([slope] if slope else []), *bin_figures("", series)]


def completions(arm: Arm) -> list[Point]:
    """Return (length, summed log_ratio) of each completion of the last quarter of the steps."""
    measured = [point for row in last_quarter(arm.mismatch) for point in points(row, "completions")]
    if measured:
        return measured
    ratios = [[d for _, _, d in _tokens(row)] for row in last_quarter(arm.rollouts)]
    return [(float(len(ds)), math.fsum(ds)) for ds in ratios if ds]


def bins(arm: Arm, by: By) -> list[Bin]:
    """Return the bins of the last quarter of the steps, merged with token-weighted means."""
    measured = pool(bin_row for row in last_quarter(arm.mismatch) for bin_row in mappings(row, by))
    if measured:
        return measured
    kept = [token for row in last_quarter(arm.rollouts) for token in _tokens(row)]
    return pool(_bin_rows(kept, by))


def last_quarter(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the last quarter of the steps; at least those of the last step."""
    steps = [number(row.get("step")) for row in rows]
    finite = [step for step in steps if math.isfinite(step)]
    if not finite:
        return []
    first, last = min(finite), max(finite)
    start = last - (last - first + 1) / 4
    return [row for row, step in zip(rows, steps, strict=True) if step > start]


def _tokens(row: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """Return (position, mu, log_ratio) of each token of a recorded rollout that has logprobs of both sides."""
    columns = zip(row.get("trainer_logprobs") or [], row.get("behavior_logprobs") or [], strict=False)
    scored = [(index, number(pi), number(mu)) for index, (pi, mu) in enumerate(columns)]
    return [(i, math.exp(min(0.0, mu)), pi - mu) for i, pi, mu in scored if math.isfinite(pi) and math.isfinite(mu)]


def _bin_rows(tokens: Sequence[tuple[int, float, float]], by: By) -> list[dict[str, float]]:
    """Return one row for each bin of the tokens, in the format of `mismatch.jsonl`."""
    edges = _PROBABILITY_EDGES if by == "by_probability" else _position_edges(tokens)
    rows = []
    for lower, upper in pairwise(edges):
        closed = upper == edges[-1]
        place = 1 if by == "by_probability" else 0
        inside = [t for t in tokens if lower <= t[place] < upper or (closed and t[place] == upper)]
        if inside:
            rows.append({"lower": lower, "upper": upper, "tokens": float(len(inside)), **_means(inside)})
    return rows


def _position_edges(tokens: Sequence[tuple[int, float, float]]) -> tuple[float, ...]:
    """Return 0, then powers of two from 8 to beyond the longest completion."""
    longest = max((position for position, _, _ in tokens), default=0)
    powers = range(3, max(4, math.ceil(math.log2(longest + 1)) + 1))
    return (0.0, *(float(2**power) for power in powers))


def _means(tokens: Sequence[tuple[int, float, float]]) -> dict[str, float]:
    return {
        "k3": math.fsum(_k3(d) for _, _, d in tokens) / len(tokens),
        "prob_gap_mean_abs": math.fsum(abs(mu * math.expm1(d)) for _, mu, d in tokens) / len(tokens),
    }


def _k3(d: float) -> float:
    """Return exp(d) - 1 - d, near 0 by its series: the subtraction would lose every digit there."""
    if abs(d) > 1e-3:
        return math.expm1(d) - d
    return d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5)))
