"""Means over prompts with confidence intervals: the prompts are resampled, each with all its completions.

An interval must have its nominal coverage, which the percentile bootstrap lacks with few prompts or with accuracies
near 0 or 1. Intervals use the bootstrap's standard error times a quantile of Student's t with P - 1 degrees of freedom;
for the mean of values between 0 and 1 they are computed on the logit scale. If all prompts are solved, or none, all
resamples are equal. With a true mean of p, the chance of P values of 1 is at most p^P, so the interval ends where that
chance equals the tail probability.

Axes: B resamples, P prompts, M measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.diagnostics.bootstrap import draws
from betterhalf.diagnostics.intervals import student_t


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its confidence interval."""

    value: float
    """The estimate."""
    low: float
    """Lower bound; NaN without an interval, as with a single prompt."""
    high: float
    """Upper bound; NaN without an interval."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" if math.isnan(self.low) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_estimates(
    measures: Mapping[str, Sequence[float]], *, resamples: int, confidence: float, seed: int
) -> dict[str, Estimate]:
    """Return the mean of each measure over prompts, with the same resamples for all measures.

    Args:
        measures: name -> one value for each prompt, P of them.
        resamples: number of resamples, B.
        confidence: level of the intervals, between 0 and 1.
        seed: the same seed gives the same resamples for the same number of prompts.
    """
    values_PM = torch.tensor(list(measures.values()), dtype=torch.float64).T
    prompts = len(values_PM)
    mean_M = values_PM.mean(0)
    errors_M = standard_errors(lambda counts_BP: counts_BP @ values_PM / prompts, prompts, resamples, seed)
    critical = critical_value(confidence, prompts)
    return {
        name: _interval(values_PM[:, index], float(mean_M[index]), critical * float(errors_M[index]), confidence)
        for index, name in enumerate(measures)
    }


def standard_errors(statistic: Callable[[Tensor], Tensor], prompts: int, resamples: int, seed: int) -> Tensor:
    """Return the bootstrap's standard errors of statistics of P prompts; NaN for a single prompt.

    Args:
        statistic: maps counts float64 [B, P], the number of times that each prompt was drawn, to values [B, M].
        prompts: number of prompts, P.
        resamples: number of resamples, B.
        seed: seed of the resamples.
    """
    if prompts < 2:
        return torch.full_like(statistic(torch.ones(1, prompts, dtype=torch.float64))[0], torch.nan)
    values_BM = torch.cat([statistic(counts_BP) for counts_BP in draws(torch.arange(prompts), resamples, seed)])
    # Resamples of P prompts vary like P - 1 independent ones.
    return values_BM.std(0, correction=0) * math.sqrt(prompts / (prompts - 1))


def critical_value(confidence: float, prompts: int) -> float:
    """Return half the width of an interval in standard errors: a quantile of Student's t."""
    return student_t((1 + confidence) / 2, max(1.0, prompts - 1.0))


def _interval(values_P: Tensor, mean: float, reach: float, confidence: float) -> Estimate:
    lowest, highest = float(values_P.min()), float(values_P.max())
    if len(values_P) > 1 and lowest == highest and lowest in (0.0, 1.0):
        beyond = ((1 - confidence) / 2) ** (1 / len(values_P))
        low, high = (beyond, 1.0) if lowest == 1 else (0.0, 1 - beyond)
        return Estimate(value=mean, low=low, high=high)
    if lowest < 0 or highest > 1 or not 0 < mean < 1:
        return Estimate(value=mean, low=mean - reach, high=mean + reach)
    centre, slope = math.log(mean / (1 - mean)), mean * (1 - mean)
    low, high = (_share(centre + side * reach / slope) for side in (-1, 1))
    return Estimate(value=mean, low=low, high=high)


def _share(logit: float) -> float:
    """Return the sigmoid of a logit, without overflow; NaN for NaN."""
    return math.nan if math.isnan(logit) else 1 / (1 + math.exp(min(700.0, -logit)))
