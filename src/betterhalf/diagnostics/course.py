"""Summary of a run's reward over time, in a few numbers and one word, and intervals of a mean over seeds.

Rewards are between 0 and 1. The word follows from four numbers, in this order:

| word | meaning |
|---|---|
| `short` | the run has fewer than 20 steps, too few to tell |
| `collapsed` | the final reward is below a quarter of the best |
| `damaged` | the final reward is below 0.8 of the best, or more than 0.05 below the first |
| `flat` | the final reward is less than 0.05 above the first |
| `dips` | the end is good, but at some point the reward fell below 0.8 of the best until then |
| `learned` | anything else |

*First* is the mean of the first five steps, *final* of the last `window` steps, *best* the largest mean of `window`
consecutive steps. A fall is measured on means of five steps, because a single step is noisy. With a `window` below
five, *first* and falls are means of `window` steps too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from betterhalf.diagnostics.intervals import student_t
from betterhalf.types import LearningOutcome

COLLAPSED_SHARE = 0.25
"""Share of the best reward below which a final reward counts as collapsed."""

DAMAGED_SHARE = 0.8
"""Share of the best reward below which a final reward counts as damaged, and an earlier reward as a dip."""

NOTICEABLE = 0.05
"""Difference of two mean rewards that counts as learned, or as lost."""

FEWEST_STEPS = 20
"""Number of steps below which a run has no other word than `short`."""

FINAL_STEPS = 20
"""Number of steps at the end of an arm whose rewards are averaged."""

_SHORT_WINDOW = 5
"""Maximum number of steps over which the first reward and a fall are averaged."""

_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCourse:
    """The rewards of a run, summarised."""

    first: float
    """Mean of the first five steps, or of `window` steps if that is fewer."""
    final: float
    """Mean of the last `window` steps."""
    lowest: float
    """Lowest reward of a step."""
    best: float
    """Largest mean of `window` consecutive steps."""
    deepest_fall: float
    """Largest share by which a mean of as many steps as `first` fell below the best one before it."""
    outcome: LearningOutcome
    """Word that summarises the course."""


def reward_course(rewards: Sequence[float], window: int) -> RewardCourse:
    """Summarise the rewards of a run's steps; `window` is lowered to a quarter of the run, and is at least 1.

    Args:
        rewards: mean reward of each step; at least one.
        window: number of steps over which the final and the best reward are averaged.
    """
    window = max(1, min(window, len(rewards) // 4))
    short = min(_SHORT_WINDOW, window)
    first, final = statistics.fmean(rewards[:short]), statistics.fmean(rewards[-window:])
    best, fall = max(window_means(rewards, window)), _deepest_fall(window_means(rewards, short))
    return RewardCourse(
        first=first,
        final=final,
        lowest=min(rewards),
        best=best,
        deepest_fall=fall,
        outcome=_outcome(first, final, best, fall) if len(rewards) >= FEWEST_STEPS else "short",
    )


def window_means(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of every `window` consecutive values."""
    return [statistics.fmean(values[start : start + window]) for start in range(len(values) - window + 1)]


def _deepest_fall(means: Sequence[float]) -> float:
    best, deepest = 0.0, 0.0
    for mean in means:
        best = max(best, mean)
        deepest = max(deepest, 1 - mean / best if best > 0 else 0.0)
    return deepest


def _outcome(first: float, final: float, best: float, fall: float) -> LearningOutcome:
    if final < COLLAPSED_SHARE * best:
        return "collapsed"
    if final < DAMAGED_SHARE * best or final < first - NOTICEABLE:
        return "damaged"
    if final < first + NOTICEABLE:
        return "flat"
    return "dips" if fall > 1 - DAMAGED_SHARE else "learned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Mean over seeds with a 95% interval."""

    count: int
    """Number of values."""
    mean: float
    """Their mean, on the scale of the interval; NaN without values."""
    low: float
    """Lower bound; NaN with fewer than two values."""
    high: float
    """Upper bound."""


def mean_over_seeds(values: Sequence[float], *, positive: bool = False, share: bool = False) -> Mean:
    """Return the mean with Student's t interval; values that are not finite are left out, and not counted.

    Args:
        values: one value for each seed.
        positive: true for a quantity such as k3, of which logarithms are averaged: the mean is geometric. If one of the
            values is 0, the values themselves are averaged.
        share: true for a quantity between 0 and 1; the interval then ends there, unless a value is outside.
    """
    finite = [value for value in values if math.isfinite(value)]
    logarithmic = positive and all(value > 0 for value in finite)
    to: Callable[[float], float] = math.log if logarithmic else float
    back: Callable[[float], float] = _exp if logarithmic else float
    kept = [to(value) for value in finite]
    if len(kept) < 2:
        return Mean(count=len(kept), mean=back(kept[0]) if kept else math.nan, low=math.nan, high=math.nan)
    centre, error = statistics.fmean(kept), statistics.stdev(kept) / math.sqrt(len(kept))
    reach = student_t((1 + _CONFIDENCE) / 2, len(kept) - 1) * error
    low, high = back(centre - reach), back(centre + reach)
    if positive:
        low = max(0.0, low)
    if share and all(0 <= value <= 1 for value in kept):
        low, high = max(0.0, low), min(1.0, high)
    return Mean(count=len(kept), mean=back(centre), low=low, high=high)


def _exp(value: float) -> float:
    """Return e to the power `value`; infinity where that is too large for a float."""
    return math.exp(value) if value < 709 else math.inf
