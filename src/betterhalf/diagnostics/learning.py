"""Verdict on the learning of a run, from the reward of each of its steps.

    learned      the reward of the last steps closed at least half of the gap between the first step's reward and 1
    collapsed    it is below half of the first step's reward
    damaged      anything between: the run learned little, or lost some of what the model could do

A perfectible set can be learned completely, so that a correct run closes the gap; no run should fall below its start.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from betterhalf.types import LearningOutcome

LAST_STEPS = 20
"""Number of steps at the end of a run whose reward is averaged; half of a run that has fewer than twice as many."""

LEARNED_SHARE = 0.5
"""Share of the gap between the first reward and 1 that a run closes at least if it learned."""

COLLAPSED_SHARE = 0.5
"""Share of the first reward below which a run has collapsed."""


def final_reward(rewards: Sequence[float]) -> float:
    """Return the mean reward of the last steps.

    Args:
        rewards: mean reward of each step; at least one.
    """
    count = min(LAST_STEPS, max(1, len(rewards) // 2))
    return statistics.fmean(rewards[-count:])


def learning_verdict(rewards: Sequence[float]) -> LearningOutcome:
    """Return the verdict on a run with these mean rewards, one for each step; at least one."""
    first, final = rewards[0], final_reward(rewards)
    if final < COLLAPSED_SHARE * first:
        return "collapsed"
    return "learned" if final - first >= LEARNED_SHARE * (1 - first) else "damaged"
