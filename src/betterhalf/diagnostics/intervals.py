"""Confidence intervals of the mismatch metrics, and where there is none, why.

An interval has to cover: a percentile bootstrap does not, with some sixteen prompts and skewed quantities (86% instead
of 95% for k3, 47% for the 1st percentile of the sequence log-ratio, 15% for a small effective sample size). Three kinds
of metrics are told apart.

* Means and what is made of means: the bootstrap's standard error, on a scale without bounds (the logarithm of what is
  positive, Fisher's z of a correlation, the logit of a share), times Student's t. Its degrees of freedom are one less
  than the clusters that count: a skewed quantity rests on few of them. With influences I of the clusters (jackknife)
  that is (sum I^2)^2 / sum I^4 (A. Carter, K. Schnepel, D. Steigerwald, 2017, in another form); signed means are less
  delicate, and all clusters count.
* Percentiles: order statistics, whose ranks follow from a binomial distribution whatever the values are distributed as,
  over as many independent values as the correlated ones are worth (E. Korn, B. Graubard, 1998). With few values there
  is no such interval, for the sample does not reach that far.
* Extremes grow with the number of tokens: there is nothing that an interval would be of.

The effective sample size has one more condition. Of weights exp(d) with d normal of deviation s, the mean square is
made by values 2 s deviations above the mean, more where prompts differ in s: with a large s a sample lacks them.

docs/probe.md states the coverage that is measured; a test measures it again.

Axes: B resamples, S completions, K clusters, C completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.diagnostics.bootstrap import Resamples, resample

_FEWEST_EFFECTIVE = 1.25
"""Effective clusters below which one of them carries nearly all of a metric."""

_LEAST_FREEDOM = 2.0
"""Degrees of freedom below which no interval is widened further: its bounds would be a factor of ten apart."""

_LEAST_PERCENTILE_FREEDOM = 4.0
"""The same for percentiles."""

WIDEST_SPREAD = 0.25
"""Deviation of the sequence log-ratio, in nats, above which the effective sample size has no interval."""

_SMALLEST = 2.0**-53
"""Distance from 1 below which float64 holds nothing."""

_ROUNDING = 1e-15
"""Relative differences that are rounding: resamples that do not differ otherwise are equal."""

_PERCENTILE = 0.99
"""All percentiles are this one, of the values or of their negatives."""

SIGNED = ("k1/mean", "log_ratio/mean", "sequence_log_ratio/mean", "slope_per_1k")
POSITIVE = (*("k2/mean", "k3/mean", "prob_gap/mean_abs", "log_ratio/std", "chi2_token", "sequence_log_ratio/std"),)
EXTREMES = ("prob_gap/max", "prob_gap/min", "log_ratio/max_abs")

_EXTREME = "an extreme grows with the number of tokens, so that there is no value to bracket"
_COUNT = "a count, not an estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Two bounds, or the reason for having none."""

    low: float
    """NaN with a reason."""
    high: float
    """NaN with a reason."""
    reason: str | None = None
    """Why no interval would cover; None where there is one."""


def confidence_intervals(
    trainer_logprobs_C: Tensor,
    behavior_logprobs_C: Tensor,
    sequence_index_C: Tensor,
    num_sequences: int,
    *,
    resamples: int,
    confidence: float,
    seed: int,
    cluster_index_S: Tensor | None = None,
) -> dict[str, Interval]:
    """Return the interval of every `mismatch/` metric, or why it has none.

    Args:
        trainer_logprobs_C: [C], finite.
        behavior_logprobs_C: [C], finite.
        sequence_index_C: int64 [C], which completion each token belongs to; completions without tokens do not count.
        num_sequences: S.
        resamples: B.
        confidence: level of the intervals, between 0 and 1.
        seed: the same seed gives the same resamples for the same completions, so pairs can be compared.
        cluster_index_S: int64 [S], which prompt each completion continues; completions stand for themselves if absent.
    """
    trainer_C, behavior_C = trainer_logprobs_C.detach().double().cpu(), behavior_logprobs_C.detach().double().cpu()
    drawn = resample(
        *(trainer_C, behavior_C, sequence_index_C.cpu(), num_sequences),
        resamples=resamples,
        seed=seed,
        cluster_index_S=cluster_index_S,
    )
    found = {name: _of_means(name, drawn, confidence) for name in (*SIGNED, *POSITIVE, "pearson")}
    found |= _percentiles(trainer_C, behavior_C, drawn, confidence)
    found["ess_fraction"] = _of_weights(drawn, confidence)
    found |= dict.fromkeys(EXTREMES, _none(_EXTREME)) | {"tokens": _none(_COUNT)}
    return {f"mismatch/{name}": interval for name, interval in found.items()}


@cache
def student_t(probability: float, freedom: float) -> float:
    """Quantile of Student's t, by bisection.

    Args:
        probability: above 0.5.
        freedom: degrees of freedom, at least 1, not necessarily whole.
    """
    low, high = 0.0, 1.0
    while _t_share(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, freedom) < probability else (low, middle)
    return high


def _t_share(t: float, freedom: float, panels: int = 200) -> float:
    """Distribution function for t >= 0: the density is cos^(freedom - 1) of the angle, integrated by Simpson's rule."""
    angles = torch.linspace(0, math.atan(t / math.sqrt(freedom)), panels + 1, dtype=torch.float64)
    weights = torch.full_like(angles, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    integral = float((weights * angles.cos().pow(freedom - 1)).sum() * angles[-1]) / (3 * panels)
    return 0.5 + math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi) * integral


def _critical(confidence: float, freedom: float) -> float:
    """Standard errors on either side; degrees of freedom are rounded down to tenths, so that quantiles recur."""
    return student_t((1 + confidence) / 2, max(1.0, math.floor(10 * freedom) / 10))


def _effective(influence_K: Tensor) -> float:
    """Clusters that count: K where all influences are of one size, 1 where a single one is not zero."""
    centred_K = influence_K - influence_K.mean()
    return float(centred_K.square().sum().square() / centred_K.pow(4).sum())


def _none(reason: str) -> Interval:
    return Interval(low=math.nan, high=math.nan, reason=reason)


# -- means


@dataclass(frozen=True, slots=True)
class _Scale:
    """A scale on which a metric has no bounds."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


_IDENTITY = _Scale(lambda x: x, lambda y: y)
_LOGARITHM = _Scale(torch.log, torch.exp)
_FISHER = _Scale(lambda r: ((1 + r).clamp(min=_SMALLEST) / (1 - r).clamp(min=_SMALLEST)).log() / 2, torch.tanh)
_LOGIT = _Scale(lambda p: (p / (1 - p).clamp(min=_SMALLEST)).log(), torch.sigmoid)
_SCALES = {
    **dict.fromkeys(SIGNED, _IDENTITY),
    **dict.fromkeys(POSITIVE, _LOGARITHM),
    "pearson": _FISHER,
    "ess_fraction": _LOGIT,
}


def _of_means(name: str, drawn: Resamples, confidence: float) -> Interval:
    estimate, values_B, without_K = drawn.estimate[name], drawn.values[name], drawn.without[name]
    clusters = len(without_K)
    if clusters < 2:
        return _none(f"one {drawn.unit} says nothing about the spread among them")
    scale = _SCALES[name]
    if bool((values_B - estimate).abs().max() <= _ROUNDING * estimate.abs()):
        return Interval(low=float(estimate), high=float(estimate))
    centre, on_scale_B, influence_K = scale.to(estimate), scale.to(values_B), scale.to(without_K)
    effective = _effective(influence_K)
    error = float(on_scale_B.std(correction=0)) * math.sqrt(clusters / (clusters - 1))
    if not (effective >= _FEWEST_EFFECTIVE and math.isfinite(error)):
        return _none(f"one of {clusters} {drawn.unit}s carries nearly all of it")
    freedom = clusters - 1 if name in SIGNED else max(_LEAST_FREEDOM, effective - 1)
    reach = _critical(confidence, freedom) * error
    low, high = scale.back(torch.stack([centre - reach, centre + reach])).tolist()
    return Interval(low=low, high=high)


def _of_weights(drawn: Resamples, confidence: float) -> Interval:
    """Give the effective sample size an interval only where the sample shows the weights that decide it."""
    spread = float(drawn.estimate["sequence_log_ratio/std"])
    if spread > WIDEST_SPREAD:
        return _none(
            f"log-ratios of completions spread by {spread:.2g} nats; above {WIDEST_SPREAD:g} a sample can lack the "
            "large weights that decide it, and the estimate is optimistic"
        )
    return _of_means("ess_fraction", drawn, confidence)


# -- percentiles


def _percentiles(trainer_C: Tensor, behavior_C: Tensor, drawn: Resamples, confidence: float) -> dict[str, Interval]:
    d_C = ops.log_ratio(trainer_C, behavior_C)
    gap_C = behavior_C.exp() * torch.expm1(d_C)
    d_S, cluster_S = drawn.sequence_log_ratio_S, drawn.cluster_S
    cluster_C = cluster_S[drawn.sequence_index_C]
    low = _of_percentile(-d_S, cluster_S, confidence, "completions")
    return {
        "prob_gap/p99_abs": _of_percentile(gap_C.abs(), cluster_C, confidence, "tokens"),
        "log_ratio/p99_abs": _of_percentile(d_C.abs(), cluster_C, confidence, "tokens"),
        "sequence_log_ratio/p1": Interval(low=-low.high, high=-low.low, reason=low.reason),
        "sequence_log_ratio/p99": _of_percentile(d_S, cluster_S, confidence, "completions"),
    }


def _of_percentile(values: Tensor, clusters: Tensor, confidence: float, unit: str) -> Interval:
    """Bracket the 99th percentile by two of the values themselves."""
    tail, needed = (1 - confidence) / 2, math.ceil(math.log((1 - confidence) / 2) / math.log(_PERCENTILE))
    worth = _worth(values, clusters, confidence)
    if worth < needed:
        return _none(
            f"{len(values)} {unit}, worth {worth} independent ones, do not reach beyond this percentile; "
            f"{100 * confidence:g}% takes {needed}"
        )
    descending = values.sort(descending=True).values
    upper, lower = _exceedances(worth, tail)
    high = descending[max(0, math.floor(upper * len(values) / worth) - 1)]
    low = descending[min(len(values), math.ceil(lower * len(values) / worth)) - 1]
    return Interval(low=float(low), high=float(high))


def _worth(values: Tensor, clusters: Tensor, confidence: float) -> int:
    """Independent values that tell as much of the share beyond the 99th percentile as these correlated ones."""
    count, groups = len(values), int(clusters.max()) + 1
    if groups < 2:
        return 0
    beyond = (values > values.quantile(_PERCENTILE) if count < 2**24 else values > _kth(values)).double()
    share = beyond.mean()
    influence_K = ops.segment_sum(beyond - share, clusters, groups) / count
    variance = float(influence_K.square().sum()) * groups / (groups - 1)
    independent = float(share * (1 - share)) / count
    stretched = max(1.0, variance / independent) if independent > 0 else 1.0
    freedom = max(_LEAST_PERCENTILE_FREEDOM, _effective(influence_K) - 1)
    widened = _critical(confidence, min(freedom, groups - 1)) / NormalDist().inv_cdf((1 + confidence) / 2)
    return math.floor(count / stretched / widened**2)


def _kth(values: Tensor) -> Tensor:
    return values.kthvalue(math.ceil(_PERCENTILE * len(values))).values


def _exceedances(count: int, tail: float) -> tuple[int, int]:
    """Ranks from the top, (of the upper bound, of the lower bound), of `count` independent values.

    The j-th largest is below the percentile when fewer than j values exceed it, and above when at least j do.
    """
    chance = _PERCENTILE**count
    below, rank, upper = 0.0, 0, 0
    while below + chance < 1 - tail:
        below += chance
        rank += 1
        upper = rank if below <= tail else upper
        chance *= (count - rank + 1) / rank * (1 - _PERCENTILE) / _PERCENTILE
    return max(1, upper), rank + 1
