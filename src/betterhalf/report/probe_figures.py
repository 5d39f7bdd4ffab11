"""The figures of a probe's pairs: the offline figure of the paper (arXiv 2510.26788, figure 2), and the bins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from betterhalf.report.bins import BinSeries, By, bin_figures, pool
from betterhalf.report.fields import mappings, points
from betterhalf.report.markup import Figure, legend
from betterhalf.report.pairs import Pair, matched
from betterhalf.report.sequences import Completions, slope_figure
from betterhalf.report.tokens import Cloud, TokenPair, gap_figure, scatter_figure

MakeFigures = Callable[[str, Sequence[Pair]], list[Figure]]
"""(prefix of the keys, pairs to draw) -> figures; none where the file lacks their data."""


def probe_figures(prefix: str, pairs: Sequence[Pair]) -> list[Figure]:
    """Return all figures of `PROBE_FIGURES` that the matched pairs have data for."""
    drawn = matched(pairs)
    return [figure for make in PROBE_FIGURES for figure in make(prefix, drawn)]


def _scatters(prefix: str, pairs: Sequence[Pair]) -> list[Figure]:
    """Return one scatter plot for each pair, on the same axes."""
    drawn = [
        scatter_figure(f"{prefix}tokens-{index}", f"Token probabilities, {cloud.name}", [cloud])
        for index, cloud in enumerate(_clouds(pairs))
    ]
    return [figure for figure in drawn if figure]


def _slope(prefix: str, pairs: Sequence[Pair]) -> list[Figure]:
    groups = [Completions(name=pair.name, style=pair.style, points=points(pair.row, "completions")) for pair in pairs]
    figure = slope_figure(f"{prefix}slope", groups)
    return [figure] if figure else []


def _gap(prefix: str, pairs: Sequence[Pair]) -> list[Figure]:
    figure = gap_figure(f"{prefix}token-gap", _clouds(pairs), _legend(pairs))
    return [figure] if figure else []


def _bins(prefix: str, pairs: Sequence[Pair]) -> list[Figure]:
    bys: tuple[By, ...] = ("by_position", "by_probability")
    series = {
        by: [BinSeries(name=pair.name, style=pair.style, bins=pool(mappings(pair.row, by))) for pair in pairs]
        for by in bys
    }
    return bin_figures(prefix, series, _legend(pairs))


PROBE_FIGURES: tuple[MakeFigures, ...] = (_scatters, _slope, _gap, _bins)
"""Every family of figures of a probe, in the order of the page."""


def _clouds(pairs: Sequence[Pair]) -> list[Cloud]:
    return [
        Cloud(
            name=pair.name,
            style=pair.style,
            pairs=[TokenPair(mu=mu, pi=pi) for mu, pi in points(pair.row, "points")],
        )
        for pair in pairs
    ]


def _legend(pairs: Sequence[Pair]) -> str:
    return legend((pair.style, escape(pair.name)) for pair in pairs if math.isfinite(pair.k3))
