"""The verdict on learning, by hand."""

from __future__ import annotations

import pytest

from betterhalf.diagnostics.learning import LAST_STEPS, final_reward, learning_verdict


def test_the_final_reward_is_the_mean_of_the_last_twenty_steps_or_of_half_a_short_run() -> None:
    assert LAST_STEPS == 20
    assert final_reward([0.0] * 30 + [0.5] * 10 + [1.0] * 10) == 0.75
    assert final_reward([0.0, 0.0, 0.4, 0.8]) == pytest.approx(0.6)
    assert final_reward([0.3]) == 0.3


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [
        (0.6, 0.8, "learned"),  # half of the gap of 0.4 is closed
        (0.6, 0.79, "damaged"),
        (0.6, 0.6, "damaged"),
        (0.6, 0.3, "damaged"),  # half of the first reward
        (0.6, 0.29, "collapsed"),
        (0.25, 0.63, "learned"),
        (1.0, 1.0, "learned"),
        (0.0, 0.0, "damaged"),  # nothing to lose
    ],
)
def test_verdicts_follow_the_thresholds(first: float, last: float, verdict: str) -> None:
    assert learning_verdict([first] + [last] * 40) == verdict
