"""Bootstrap resamples of the mismatch metrics: over completions, or over prompts with all their completions.

The tokens of a completion are correlated, so whole completions are resampled, not single tokens (the cluster bootstrap;
B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). Siblings share a prompt, and with it the
difficulty of its continuations. Where prompts are known and numerous enough, prompts are therefore resampled with all
their completions, so that an interval covers other prompts of the same kind. With fewer than `FEWEST_CLUSTERS` prompts,
completions are resampled instead.

A resample is a row of counts: the number of times that each completion was drawn. Every metric is computed from those
counts, and equals what `mismatch_metrics` would return for the resampled data: means come from per-completion sums,
extremes from those of the drawn completions, quantiles from weighted ranks. A test compares the two.

Axes: B resamples, S completions, K clusters, C completion tokens, Q per-completion sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.diagnostics.logprob_gap import ACCIDENT, k3

FEWEST_CLUSTERS = 8
"""Fewest prompts for which prompts, instead of completions, are resampled."""

_GROUPS = 256
"""Maximum number of jackknife groups: up to this number, clusters are left out one by one; beyond it, in groups."""

_CHUNK = 1 << 20
"""Maximum number of counts (resamples times completions) in memory at once."""

_TAIL = 0.03
"""Share of the largest values that is searched first for a 99th percentile."""

_SUMS = (
    *("length", "d", "d2", "k3", "abs_d", "gap", "gap2", "chi2", "low", "high"),
    *("x", "y", "x2", "y2", "xy"),
)
"""Per-completion sums, the columns of `_Statistics.sums_SQ`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statistics:
    """Statistics of the data from which every metric of a resample can be computed."""

    sums_SQ: Tensor
    """Sums of `_SUMS` over each completion's tokens; d, x = pi and y = mu are centred on their overall means."""
    means: tuple[float, float, float]
    """Means that were subtracted from d, x and y, so that the sums of squares do not lose digits to cancellation."""
    d_S: Tensor
    """Sequence log-ratio."""
    lengths_S: Tensor
    """Number of tokens."""
    highest_SE: Tensor
    """Largest value of gap, -gap, abs(d), x, -x, y, -y, d, -d among each completion's tokens."""
    equal_S: Tensor
    """True where pi equals mu at every token of the completion."""
    tokens: tuple[_Ranked, _Ranked]
    """abs(gap) and abs(d) of each token."""
    sequences: tuple[_Ranked, _Ranked]
    """d_S and -d_S."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranked:
    """Values in descending order, and the completion that each belongs to."""

    values: Tensor
    owners: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Resamples:
    """The `mismatch/` metrics, named without that prefix, of the data and of its resamples."""

    estimate: dict[str, Tensor]
    """float64 []: value on the data."""
    values: dict[str, Tensor]
    """float64 [B]: value on each resample."""
    without: dict[str, Tensor]
    """float64 [K]: value on the data without one cluster, or one of `_GROUPS` groups of clusters (the jackknife)."""
    cluster_S: Tensor
    """int64 [S]: the cluster of each completion."""
    sequence_index_C: Tensor
    """int64 [C]: the completion of each token."""
    sequence_log_ratio_S: Tensor
    """float64 [S]: the summed log-ratio."""
    unit: str
    """Kind of the clusters: `prompt` or `completion`."""


def resample(
    trainer_logprobs_C: Tensor,
    behavior_logprobs_C: Tensor,
    sequence_index_C: Tensor,
    num_sequences: int,
    *,
    resamples: int,
    seed: int,
    cluster_index_S: Tensor | None = None,
) -> Resamples:
    """Draw clusters with replacement, and leave out each one in turn; the same draws for all metrics.

    Args:
        trainer_logprobs_C: float64 [C], finite.
        behavior_logprobs_C: float64 [C], finite.
        sequence_index_C: int64 [C], which completion each token belongs to; completions without tokens do not count.
        num_sequences: number of sequences, S.
        resamples: number of resamples, B.
        seed: the same seed gives the same resamples for the same completions.
        cluster_index_S: int64 [S], which prompt each completion continues; if None, each completion is its own cluster.
    """
    index_C, cluster_S = _only_present(sequence_index_C, num_sequences, cluster_index_S)
    statistics = _statistics(trainer_logprobs_C, behavior_logprobs_C, index_C, len(cluster_S))
    clusters = int(cluster_S.max()) + 1
    alone = _metrics(statistics, torch.ones(1, len(cluster_S), dtype=torch.float64))
    others = [_metrics(statistics, counts) for counts in _all_but_one(cluster_S % _GROUPS)]
    chunks = [_metrics(statistics, counts) for counts in draws(cluster_S, resamples, seed)]
    return Resamples(
        estimate={name: value[0] for name, value in alone.items()},
        values={name: torch.cat([chunk[name] for chunk in chunks]) for name in alone},
        without={name: torch.cat([chunk[name] for chunk in others]) for name in alone} if others else dict(alone),
        cluster_S=cluster_S,
        sequence_index_C=index_C,
        sequence_log_ratio_S=statistics.d_S,
        unit="completion" if clusters == len(cluster_S) else "prompt",
    )


def resampled_metrics(
    trainer_logprobs_C: Tensor,
    behavior_logprobs_C: Tensor,
    sequence_index_C: Tensor,
    num_sequences: int,
    counts_BS: Tensor,
) -> dict[str, Tensor]:
    """Return every `mismatch/` metric of each resample, float64 [B].

    Args:
        trainer_logprobs_C: [C], finite.
        behavior_logprobs_C: [C], finite.
        sequence_index_C: int64 [C]; every completion has at least one token.
        num_sequences: number of sequences, S.
        counts_BS: number of times that each completion was drawn; at least one count of each row is above 0.
    """
    statistics = _statistics(trainer_logprobs_C.double(), behavior_logprobs_C.double(), sequence_index_C, num_sequences)
    return {f"mismatch/{name}": value for name, value in _metrics(statistics, counts_BS.double()).items()}


def _only_present(index_C: Tensor, num_sequences: int, cluster_S: Tensor | None) -> tuple[Tensor, Tensor]:
    """Renumber the completions without empty ones; return the completion of each token and the cluster of each."""
    present_S = torch.bincount(index_C, minlength=num_sequences) > 0
    renumbered_S = present_S.long().cumsum(0) - 1
    own_S = torch.arange(int(present_S.sum()))
    if cluster_S is None:
        return renumbered_S[index_C], own_S
    clusters, inverse_S = torch.unique(cluster_S.cpu()[present_S], return_inverse=True)
    return renumbered_S[index_C], inverse_S if len(clusters) >= FEWEST_CLUSTERS else own_S


def draws(cluster_S: Tensor, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield the counts [B, S] of all resamples, a chunk at a time."""
    generator = torch.Generator().manual_seed(seed)
    clusters = int(cluster_S.max()) + 1
    at_once = max(1, _CHUNK // len(cluster_S))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = torch.randint(clusters, (rows, clusters), generator=generator)
        counts = torch.zeros(rows, clusters, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        yield counts[:, cluster_S]


def _all_but_one(cluster_S: Tensor) -> Iterator[Tensor]:
    """Yield the counts [K, S] that leave out one cluster each, a chunk at a time; none if there is only one cluster."""
    clusters, at_once = int(cluster_S.max()) + 1, max(1, _CHUNK // len(cluster_S))
    for start in range(0, clusters if clusters > 1 else 0, at_once):
        left_out = torch.arange(start, min(clusters, start + at_once)).unsqueeze(1)
        yield (cluster_S != left_out).double()


def _statistics(trainer_C: Tensor, behavior_C: Tensor, index_C: Tensor, num_sequences: int) -> _Statistics:
    d_C = ops.log_ratio(trainer_C, behavior_C)
    gap_C = behavior_C.exp() * torch.expm1(d_C)
    x_C, y_C = trainer_C.exp(), behavior_C.exp()
    d0, x0, y0 = (float(values.mean()) for values in (d_C, x_C, y_C))
    d, x, y = d_C - d0, x_C - x0, y_C - y0
    moments = (torch.ones_like(d), d, d * d, k3(d_C), d_C.abs())
    gaps = (gap_C.abs(), gap_C.square(), torch.expm1(d_C).square())
    accidents = ((d_C < -ACCIDENT).double(), (d_C > ACCIDENT).double())
    columns = (*moments, *gaps, *accidents, x, y, x * x, y * y, x * y)
    d_S = ops.segment_sum(d_C, index_C, num_sequences)
    return _Statistics(
        sums_SQ=torch.stack([ops.segment_sum(column, index_C, num_sequences) for column in columns], 1),
        means=(d0, x0, y0),
        d_S=d_S,
        lengths_S=ops.segment_sum(torch.ones_like(d), index_C, num_sequences),
        highest_SE=torch.stack(
            [
                _segment_max(values, index_C, num_sequences)
                for values in (gap_C, -gap_C, d_C.abs(), x_C, -x_C, y_C, -y_C, d_C, -d_C)
            ],
            1,
        ),
        equal_S=_segment_max((x_C != y_C).double(), index_C, num_sequences) == 0,
        tokens=(_ranked(gap_C.abs(), index_C), _ranked(d_C.abs(), index_C)),
        sequences=(_ranked(d_S, torch.arange(num_sequences)), _ranked(-d_S, torch.arange(num_sequences))),
    )


def _segment_max(values_C: Tensor, index_C: Tensor, num_sequences: int) -> Tensor:
    out = torch.full((num_sequences,), -torch.inf, dtype=values_C.dtype)
    return out.scatter_reduce(0, index_C, values_C, "amax")


def _ranked(values: Tensor, owners: Tensor) -> _Ranked:
    ordered = values.sort(descending=True)
    return _Ranked(values=ordered.values, owners=owners[ordered.indices])


def _metrics(statistics: _Statistics, counts_BS: Tensor) -> dict[str, Tensor]:
    """Return the metrics of each resample, named as in `logprob_gap` without the prefix."""
    sums_BQ = counts_BS @ statistics.sums_SQ
    tokens_B = sums_BQ[:, 0]
    mean = {name: sums_BQ[:, column] / tokens_B for column, name in enumerate(_SUMS)}
    d0, _, _ = statistics.means
    highest_BE = _highest(statistics.highest_SE, counts_BS)
    by_gap, by_d = statistics.tokens
    log_ratio_B = mean["d"] + d0
    variance_B = mean["d2"] - mean["d"].square()
    return {
        "k1/mean": -log_ratio_B,
        "k2/mean": (variance_B + log_ratio_B.square()) / 2,
        "k3/mean": mean["k3"],
        "prob_gap/mean_abs": mean["gap"],
        "prob_gap/std_abs": (mean["gap2"] - mean["gap"].square()).clamp(min=0).sqrt(),
        "prob_gap/p99_abs": _quantile(by_gap, counts_BS, tokens_B, 0.99),
        "prob_gap/max": highest_BE[:, 0],
        "prob_gap/min": -highest_BE[:, 1],
        "log_ratio/mean": log_ratio_B,
        "log_ratio/mean_abs": mean["abs_d"],
        "log_ratio/std": variance_B.clamp(min=0).sqrt(),
        "log_ratio/max": highest_BE[:, 7],
        "log_ratio/min": -highest_BE[:, 8],
        "log_ratio/p99_abs": _quantile(by_d, counts_BS, tokens_B, 0.99),
        "log_ratio/max_abs": highest_BE[:, 2],
        "accident_fraction": mean["low"],
        "accident_fraction_above": mean["high"],
        "chi2_token": mean["chi2"],
        "pearson": _pearson(mean, highest_BE, counts_BS, statistics.equal_S),
        **_sequence_metrics(statistics, counts_BS),
        "tokens": tokens_B,
    }


def _sequence_metrics(statistics: _Statistics, counts_BS: Tensor) -> dict[str, Tensor]:
    d_S, lengths_S = statistics.d_S, statistics.lengths_S
    drawn_B = counts_BS.sum(1)
    highest, lowest = statistics.sequences
    mean_B = counts_BS @ d_S / drawn_B
    variance_B = (counts_BS * (d_S - mean_B.unsqueeze(1)).square()).sum(1) / drawn_B
    log_counts_BS = counts_BS.log()
    twice_B = 2 * (d_S + log_counts_BS).logsumexp(1)
    return {
        "sequence_log_ratio/mean": mean_B,
        "sequence_log_ratio/std": variance_B.sqrt(),
        "sequence_log_ratio/p1": -_quantile(lowest, counts_BS, drawn_B, 0.99),
        "sequence_log_ratio/p99": _quantile(highest, counts_BS, drawn_B, 0.99),
        "slope_per_1k": 1000 * _slope(lengths_S, d_S, counts_BS),
        "ess_fraction": (twice_B - (2 * d_S + log_counts_BS).logsumexp(1)).exp() / drawn_B,
    }


def _highest(values_SE: Tensor, counts_BS: Tensor) -> Tensor:
    """Return the largest value among the drawn completions, [B, E]."""
    absent_BS = counts_BS == 0
    columns = [column.expand_as(counts_BS).masked_fill(absent_BS, -torch.inf) for column in values_SE.unbind(1)]
    return torch.stack([column.max(1).values for column in columns], 1)


def _quantile(ranked: _Ranked, counts_BS: Tensor, total_B: Tensor, share: float) -> Tensor:
    """Return an upper quantile of the drawn values, interpolated linearly between the two nearest ranks.

    The search covers only the largest values, as many as every resample needs.
    """
    rank_B = share * (total_B - 1)
    low_B, high_B = total_B - 1 - rank_B.floor(), total_B - 1 - rank_B.ceil()
    reach = max(1, round(_TAIL * len(ranked.values)))
    while True:
        cumulated = counts_BS[:, ranked.owners[:reach]].cumsum(1)
        if reach >= len(ranked.values) or bool((cumulated[:, -1] > low_B).all()):
            break
        reach *= 2
    low, high = (
        ranked.values[torch.searchsorted(cumulated, place_B.unsqueeze(1), right=True).squeeze(1)]
        for place_B in (low_B, high_B)
    )
    return low + (high - low) * (rank_B - rank_B.floor())


def _slope(lengths_S: Tensor, d_S: Tensor, counts_BS: Tensor) -> Tensor:
    """Return the least-squares slope of d on length; through the origin where all drawn lengths are equal."""
    drawn_B = counts_BS.sum(1)
    x_B, y_B = counts_BS @ lengths_S / drawn_B, counts_BS @ d_S / drawn_B
    spread_BS = lengths_S - x_B.unsqueeze(1)
    slope_B = (counts_BS * spread_BS * (d_S - y_B.unsqueeze(1))).sum(1) / (counts_BS * spread_BS.square()).sum(1)
    extremes_BE = _highest(torch.stack([lengths_S, -lengths_S], 1), counts_BS)
    through_origin_B = y_B / extremes_BE[:, 0]
    return torch.where(extremes_BE[:, 0] == -extremes_BE[:, 1], through_origin_B, slope_B)


def _pearson(mean: dict[str, Tensor], highest_BE: Tensor, counts_BS: Tensor, equal_S: Tensor) -> Tensor:
    """Return the correlation of pi and mu; where one of them is constant, 1 if both are equal and else 0."""
    x2_B, y2_B = mean["x2"] - mean["x"].square(), mean["y2"] - mean["y"].square()
    correlation_B = (mean["xy"] - mean["x"] * mean["y"]) / (x2_B * y2_B).sqrt()
    constant_B = (highest_BE[:, 3] == -highest_BE[:, 4]) | (highest_BE[:, 5] == -highest_BE[:, 6])
    return torch.where(constant_B, (counts_BS @ (~equal_S).double() == 0).double(), correlation_B)
