"""Rewards that cannot be used are refused."""

from __future__ import annotations

import math

import pytest

from betterhalf.errors import RewardError
from betterhalf.tasks.rewards import check_rewards


def test_finite_rewards_of_the_right_number_pass() -> None:
    check_rewards([0.0, 1.0, -0.5], 3)
    check_rewards([], 0)


@pytest.mark.parametrize("count", [2, 4])
def test_too_few_or_too_many_rewards_are_refused(count: int) -> None:
    with pytest.raises(RewardError, match=f"3 rewards for {count} completions"):
        check_rewards([0.0, 1.0, 1.0], count)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(RewardError, match=f"reward 1 of 2 is {value}"):
        check_rewards([1.0, value], 2)
