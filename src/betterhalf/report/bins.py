"""Figures of the mismatch by position in the completion and by token probability, which a mean over tokens hides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.fields import number
from betterhalf.report.marks import Band
from betterhalf.report.markup import Figure, shown, table

By = Literal["by_position", "by_probability"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Statistics of one bin, over one or several steps."""

    lower: float
    """Lower edge."""
    upper: float
    """Upper edge; infinite if the bin is open."""
    tokens: float
    """Number of tokens."""
    k3: float
    """Mean over the bin's tokens, in nats."""
    gap: float
    """Mean of abs(pi - mu)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BinSeries:
    """The bins of one run or pair, in ascending order."""

    name: str
    style: int
    bins: Sequence[Bin]


@dataclass(frozen=True, slots=True, kw_only=True)
class BinSpec:
    """Specification of one figure over bins."""

    by: By
    quantity: Literal["k3", "gap"]
    title: str
    unit: str
    across: str
    caption: str
    metric: str | None = None
    """Metric whose healthy band is shaded, if any."""


BIN_FIGURES = (
    BinSpec(
        by="by_position",
        quantity="k3",
        title="Mismatch by position",
        unit="mean k3, nats per token",
        across="token",
        metric="mismatch/k3/mean",
        caption="Healthy: level. A rise with the position means that differences build up in the KV cache.",
    ),
    BinSpec(
        by="by_position",
        quantity="gap",
        title="Gap by position",
        unit="mean |pi \u2212 mu|",
        across="token",
        caption="The same difference in probability instead of nats.",
    ),
    BinSpec(
        by="by_probability",
        quantity="k3",
        title="Mismatch by probability",
        unit="mean k3, nats per token",
        across="mu",
        metric="mismatch/k3/mean",
        caption="Rare tokens differ most: the same rounding error of a logit changes their log-probability more.",
    ),
    BinSpec(
        by="by_probability",
        quantity="gap",
        title="Gap by probability",
        unit="mean |pi \u2212 mu|",
        across="mu",
        caption="The gap in probability is largest where mu is close to neither 0 nor 1.",
    ),
)
"""The figures over bins, in order."""


def pool(rows: Iterable[Mapping[str, Any]]) -> list[Bin]:
    """Merge bins of several steps (from `diagnostics.logprob_gap`, as JSON) by range, with token-weighted means."""
    pooled: dict[tuple[float, float], Bin] = {}
    for row in rows:
        new = _read(row)
        if new is not None:
            old = pooled.get((new.lower, new.upper))
            pooled[new.lower, new.upper] = _merge(old, new) if old else new
    return [pooled[key] for key in sorted(pooled)]


def bin_figures(prefix: str, series: Mapping[By, Sequence[BinSeries]], legend: str = "") -> list[Figure]:
    """Return the figures of `BIN_FIGURES` that have data; `prefix` makes their keys unique on the page."""
    drawn = (_figure(prefix, spec, [one for one in series[spec.by] if one.bins], legend) for spec in BIN_FIGURES)
    return [figure for figure in drawn if figure is not None]


def _read(row: Mapping[str, Any]) -> Bin | None:
    lower, upper, tokens = (number(row.get(key)) for key in ("lower", "upper", "tokens"))
    if not math.isfinite(lower) or not tokens > 0:
        return None
    return Bin(
        lower=lower,
        upper=math.inf if math.isnan(upper) else upper,
        tokens=tokens,
        k3=number(row.get("k3")),
        gap=number(row.get("prob_gap_mean_abs")),
    )


def _merge(one: Bin, other: Bin) -> Bin:
    total = one.tokens + other.tokens

    def mean(a: float, b: float) -> float:
        return (a * one.tokens + b * other.tokens) / total

    k3, gap = mean(one.k3, other.k3), mean(one.gap, other.gap)
    return Bin(lower=one.lower, upper=one.upper, tokens=total, k3=k3, gap=gap)


def _figure(prefix: str, spec: BinSpec, series: Sequence[BinSeries], legend: str) -> Figure | None:
    ranges = sorted({(one.lower, one.upper) for run in series for one in run.bins})
    key = f"{prefix}{spec.by.replace('_', '-')}-{spec.quantity}"
    image = draw(
        Chart(
            key=key,
            title=f"{spec.title} ({spec.unit})",
            series=tuple(_joined(run, spec, ranges) for run in series),
            across=spec.across,
            across_range=(0.0, float(max(1, len(ranges)))),
            across_ticks=_edges(ranges),
            scale="log10",
            band=_band(spec.metric),
        )
    )
    if image is None:
        return None
    return Figure(
        key=key,
        title=spec.title,
        unit=spec.unit,
        image=image,
        legend=legend,
        caption=spec.caption,
        numbers=_numbers(series, spec),
    )


def _joined(run: BinSeries, spec: BinSpec, ranges: Sequence[tuple[float, float]]) -> Series:
    points = [(ranges.index((one.lower, one.upper)) + 0.5, _value(one, spec)) for one in run.bins]
    return Series(name=run.name, style=run.style, points=points)


def _value(one: Bin, spec: BinSpec) -> float:
    return one.k3 if spec.quantity == "k3" else one.gap


def _edges(ranges: Sequence[tuple[float, float]]) -> tuple[tuple[float, str], ...]:
    """Return the labels at the edges of the bins, which are drawn side by side at equal widths."""
    starts = [(float(index), f"{lower:g}") for index, (lower, _) in enumerate(ranges)]
    return (*starts, *((float(len(ranges)), _edge(upper)) for _, upper in ranges[-1:]))


def _edge(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else ""


def _band(metric: str | None) -> Band | None:
    known = CATALOGUE.get(metric or "")
    return known.band if known else None


def _numbers(series: Sequence[BinSeries], spec: BinSpec) -> str:
    rows = [
        [run.name, f"{one.lower:g} to {_edge(one.upper) or 'the end'}", f"{one.tokens:,.0f}", shown(_value(one, spec))]
        for run in series
        for one in run.bins
    ]
    return table(["", spec.across, "tokens", spec.unit], rows)
