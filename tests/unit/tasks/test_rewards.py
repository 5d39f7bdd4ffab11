"""Rewards that cannot be used are refused."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None (NoneType)"),
        ("1.0", "'1.0' (str)"),
        (b"1", "b'1' (bytes)"),
        ([1.0], "[1.0] (list)"),
        (1 + 2j, "(1+2j) (complex)"),
        (torch.ones(2), "tensor([1., 1.]) (Tensor)"),
        (torch.tensor(math.nan), "tensor(nan) (Tensor)"),
        (numpy.float32("inf"), "np.float32(inf) (float32)"),
        (10**400, "1000"),
    ],
)
def test_a_reward_that_is_no_number_is_named_with_what_it_is(value: Any, shown: str) -> None:
    with pytest.raises(RewardError, match=f"reward 0 of 2 is {re.escape(shown)}.*; make the task's grader return"):
        check_rewards([value, 1.0], 2)


def test_every_kind_of_number_becomes_a_float() -> None:
    given = [1, True, False, numpy.float32(0.5), numpy.int64(2), torch.tensor(0.25), torch.ones(1), Fraction(1, 8)]
    found = check_rewards(given, len(given))
    assert found == [1.0, 1.0, 0.0, 0.5, 2.0, 0.25, 1.0, 0.125]
    assert {type(value) for value in found} == {float}
    assert check_rewards(torch.tensor([0.0, 1.0]), 2) == check_rewards(numpy.array([0.0, 1.0]), 2) == [0.0, 1.0]


@pytest.mark.parametrize("rewards", [None, 1.0, True, torch.tensor(1.0)])
def test_rewards_that_are_no_list_are_refused(rewards: Any) -> None:
    with pytest.raises(
        RewardError, match=f"returned {re.escape(str(rewards))}.* as the rewards of 2 completions; `rewards` must"
    ):
        check_rewards(rewards, 2)
