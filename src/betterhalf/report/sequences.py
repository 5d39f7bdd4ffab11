"""Sequence log-ratio against length with its least-squares line, as in figure 2 of the paper (arXiv 2510.26788)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.fields import Point
from betterhalf.report.markup import Figure, legend, shown, table
from betterhalf.report.numbers import least_squares

_MAX_POINTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """The completions of one run or pair."""

    name: str
    style: int
    points: Sequence[Point]
    """(length in tokens, summed log_ratio in nats) of each."""

    @property
    def slope_per_1k(self) -> float:
        """Least-squares slope in nats per 1,000 tokens; NaN without completions."""
        return 1000 * least_squares(self.points)[0]


def slope_figure(key: str, groups: Sequence[Completions], caption: str = "") -> Figure | None:
    """Return the figure; None if no completion was recorded."""
    groups = [group for group in groups if group.points]
    if not groups:
        return None
    image = draw(
        Chart(
            key=key,
            title="Sequence log-ratio against length (nats, tokens)",
            series=tuple(map(_series, sorted(groups, key=_width, reverse=True))),
            across="tokens",
            include=(0.0,),
            across_include=(0.0,),
            wedge=_wedge(),
        )
    )
    assert image is not None  # points are finite and the axis is linear
    return Figure(
        key=key,
        title="Log-ratio against length",
        unit="log(pi / mu) of a completion in nats (vertical), its length in tokens (horizontal)",
        image=image,
        legend=legend((group.style, _label(group)) for group in groups),
        caption="Each mark is a completion; the line is the least-squares fit. Healthy: a slope within the shaded "
        f"wedge ({_wedge_words()} nats per 1,000 tokens). A falling line means that pi gives the sampled tokens less "
        f"probability than mu. {caption}",
        numbers=_numbers(groups),
    )


def _series(group: Completions) -> Series:
    stride = max(1, math.ceil(len(group.points) / _MAX_POINTS))
    fit = least_squares(group.points)
    return Series(name=group.name, style=group.style, points=group.points[::stride], joined=False, fit=fit)


def _width(group: Completions) -> float:
    return max(abs(y) for _, y in group.points)


def _label(group: Completions) -> str:
    return f"{escape(group.name)} <small>{shown(group.slope_per_1k, '+.3g')} per 1k</small>"


def _wedge() -> tuple[float, float]:
    """Return the healthy slopes in nats per token."""
    low, high = CATALOGUE["mismatch/slope_per_1k"].band or (None, None)
    return (low or 0.0) / 1000, (high or 0.0) / 1000


def _wedge_words() -> str:
    low, high = _wedge()
    return f"{1000 * low:g} to {1000 * high:g}"


def _numbers(groups: Sequence[Completions]) -> str:
    head = ["", "completions", "mean tokens", "slope per 1k", "mean log-ratio", "lowest", "highest"]
    return table(head, [_row(group) for group in groups])


def _row(group: Completions) -> list[str]:
    count = len(group.points)
    ratios = [y for _, y in group.points]
    return [
        group.name,
        str(count),
        f"{math.fsum(x for x, _ in group.points) / count:.1f}",
        *(shown(value) for value in (group.slope_per_1k, math.fsum(ratios) / count, min(ratios), max(ratios))),
    ]
