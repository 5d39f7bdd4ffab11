"""Confidence intervals of the mismatch metrics, or the reason why a metric has none.

An interval must have its nominal coverage. A percentile bootstrap does not, with about sixteen prompts and skewed
quantities: it covers 86% instead of 95% for k3, 47% for the 1st percentile of the sequence log-ratio, and 15% for a
small effective sample size. Three kinds of metrics are treated differently.

* Means and functions of means: the bootstrap's standard error on an unbounded scale (the logarithm of a positive value,
  Fisher's z of a correlation, the logit of a share), times a quantile of Student's t. The degrees of freedom are the
  effective number of clusters minus one, because a skewed quantity depends on few clusters. With influences I of the
  clusters (jackknife), the effective number is (sum I^2)^2 / sum I^4 (A. Carter, K. Schnepel, D. Steigerwald, 2017, in
  another form). Signed means are less sensitive, and all clusters count.
* Percentiles: order statistics, whose ranks follow a binomial distribution whatever the distribution of the values,
  over the number of independent values that the correlated ones are equivalent to (E. Korn, B. Graubard, 1998). With
  few values there is no such interval, because the sample does not reach far enough.
* Extremes: no interval, because they grow with the number of tokens, so that there is no fixed value to cover.

The effective sample size has one more condition. For weights exp(d) with d normal of standard deviation s, the mean
square is dominated by values 2 s standard deviations above the mean, and by larger ones where prompts differ in s. With
a large s, a sample lacks them.

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
"""Effective number of clusters below which a single one determines nearly all of a metric."""

_LEAST_FREEDOM = 2.0
"""Lower limit of the degrees of freedom: with fewer, the bounds of an interval would be a factor of ten apart."""

_LEAST_PERCENTILE_FREEDOM = 4.0
"""Lower limit of the degrees of freedom for percentiles."""

WIDEST_SPREAD = 0.25
"""Standard deviation of the sequence log-ratio, in nats, above which the effective sample size has no interval."""

_SMALLEST = 2.0**-53
"""Smallest distance below 1 that float64 can represent."""

_ROUNDING = 1e-15
"""Relative difference up to which resamples count as equal: it is rounding."""

_PERCENTILE = 0.99
"""The percentile that all percentile metrics use, of the values or of their negatives."""

SIGNED = ("k1/mean", "log_ratio/mean", "sequence_log_ratio/mean", "slope_per_1k")
POSITIVE = (
    *("k2/mean", "k3/mean", "prob_gap/mean_abs", "prob_gap/std_abs", "log_ratio/mean_abs", "log_ratio/std"),
    *("chi2_token", "sequence_log_ratio/std"),
)
EXTREMES = ("prob_gap/max", "prob_gap/min", "log_ratio/max", "log_ratio/min", "log_ratio/max_abs")
ACCIDENTS = ("accident_fraction", "accident_fraction_above")

_EXTREME = "an extreme grows with the number of tokens, so there is no fixed value to bracket"
_RARE = "accidents are too rare: in most samples a few tokens, or none, decide"
_COUNT = "a count, not an estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bounds of a confidence interval, or the reason why there is none."""

    low: float
    """Lower bound; NaN without an interval."""
    high: float
    """Upper bound; NaN without an interval."""
    reason: str | None = None
    """Reason why no interval would have its nominal coverage; None if there is an interval."""


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
    """Return the interval of every `mismatch/` metric, or the reason why it has none.

    Args:
        trainer_logprobs_C: [C], finite.
        behavior_logprobs_C: [C], finite.
        sequence_index_C: int64 [C], which completion each token belongs to; completions without tokens do not count.
        num_sequences: number of sequences, S.
        resamples: number of resamples, B.
        confidence: level of the intervals, between 0 and 1.
        seed: the same seed gives the same resamples for the same completions, so pairs can be compared.
        cluster_index_S: int64 [S], which prompt each completion continues; if None, each completion is its own cluster.
    """
    trainer_C, behavior_C = trainer_logprobs_C.detach().double().cpu(), behavior_logprobs_C.detach().double().cpu()
    drawn = resample(
        *(trainer_C, behavior_C, sequence_index_C.cpu(), num_sequences),
        resamples=resamples,
        seed=seed,
        cluster_index_S=cluster_index_S,
    )
    found = {name: _mean_interval(name, drawn, confidence) for name in (*SIGNED, *POSITIVE, "pearson")}
    found |= _percentiles(trainer_C, behavior_C, drawn, confidence)
    found["ess_fraction"] = _ess_interval(drawn, confidence)
    found |= dict.fromkeys(EXTREMES, _none(_EXTREME)) | dict.fromkeys(ACCIDENTS, _none(_RARE))
    found["tokens"] = _none(_COUNT)
    return {f"mismatch/{name}": interval for name, interval in found.items()}


@cache
def student_t(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t, by bisection.

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
    """Return the distribution function at t >= 0, by Simpson's rule.

    Over the angle atan(t / sqrt(freedom)), the density is proportional to cos^(freedom - 1).
    """
    angles = torch.linspace(0, math.atan(t / math.sqrt(freedom)), panels + 1, dtype=torch.float64)
    weights = torch.full_like(angles, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    integral = float((weights * angles.cos().pow(freedom - 1)).sum() * angles[-1]) / (3 * panels)
    return 0.5 + math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi) * integral


def _critical(confidence: float, freedom: float) -> float:
    """Return half the width in standard errors; degrees of freedom are rounded down to tenths, for the cache."""
    return student_t((1 + confidence) / 2, max(1.0, math.floor(10 * freedom) / 10))


def _effective(influence_K: Tensor) -> float:
    """Return the effective number of clusters: K if all influences have the same size, 1 if only one is not zero."""
    centred_K = influence_K - influence_K.mean()
    return float(centred_K.square().sum().square() / centred_K.pow(4).sum())


def _none(reason: str) -> Interval:
    return Interval(low=math.nan, high=math.nan, reason=reason)


# -- means


@dataclass(frozen=True, slots=True)
class _Scale:
    """A scale on which a metric is unbounded, and the way back."""

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


def _mean_interval(name: str, drawn: Resamples, confidence: float) -> Interval:
    estimate, values_B, without_K = drawn.estimate[name], drawn.values[name], drawn.without[name]
    clusters = len(without_K)
    if clusters < 2:
        return _none(f"a single {drawn.unit} gives no estimate of the spread")
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


def _ess_interval(drawn: Resamples, confidence: float) -> Interval:
    """Return the interval of the effective sample size, if the sample can contain the weights that determine it."""
    spread = float(drawn.estimate["sequence_log_ratio/std"])
    if spread > WIDEST_SPREAD:
        return _none(
            f"the log-ratios of completions have a standard deviation of {spread:.2g} nats; above {WIDEST_SPREAD:g} a "
            "sample may lack the large weights that determine the value, and the estimate is optimistic"
        )
    return _mean_interval("ess_fraction", drawn, confidence)


# -- percentiles


def _percentiles(trainer_C: Tensor, behavior_C: Tensor, drawn: Resamples, confidence: float) -> dict[str, Interval]:
    d_C = ops.log_ratio(trainer_C, behavior_C)
    gap_C = behavior_C.exp() * torch.expm1(d_C)
    d_S, cluster_S = drawn.sequence_log_ratio_S, drawn.cluster_S
    cluster_C = cluster_S[drawn.sequence_index_C]
    low = _percentile_interval(-d_S, cluster_S, confidence, "completions")
    return {
        "prob_gap/p99_abs": _percentile_interval(gap_C.abs(), cluster_C, confidence, "tokens"),
        "log_ratio/p99_abs": _percentile_interval(d_C.abs(), cluster_C, confidence, "tokens"),
        "sequence_log_ratio/p1": Interval(low=-low.high, high=-low.low, reason=low.reason),
        "sequence_log_ratio/p99": _percentile_interval(d_S, cluster_S, confidence, "completions"),
    }


def _percentile_interval(values: Tensor, clusters: Tensor, confidence: float, unit: str) -> Interval:
    """Bracket the 99th percentile by two of the values themselves."""
    tail, needed = (1 - confidence) / 2, math.ceil(math.log((1 - confidence) / 2) / math.log(_PERCENTILE))
    independent = _independent_count(values, clusters, confidence)
    if independent < needed:
        number, noun = independent or "fewer than 1", "one" if independent < 2 else "ones"
        return _none(
            f"{len(values)} {unit}, equivalent to {number} independent {noun}, are too few to reach beyond this "
            f"percentile; {100 * confidence:g}% confidence takes {needed}"
        )
    descending = values.sort(descending=True).values
    upper, lower = _bounding_ranks(independent, tail)
    high = descending[max(0, math.floor(upper * len(values) / independent) - 1)]
    low = descending[min(len(values), math.ceil(lower * len(values) / independent)) - 1]
    return Interval(low=float(low), high=float(high))


def _independent_count(values: Tensor, clusters: Tensor, confidence: float) -> int:
    """Return the number of independent values that are as informative about the share beyond the 99th percentile."""
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


def _bounding_ranks(count: int, tail: float) -> tuple[int, int]:
    """Return the ranks, from the top, of the upper and the lower bound among `count` independent values.

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
