"""Sums of rewards: normalisation by group, weights, scale and bounds."""

from __future__ import annotations

import statistics

import pytest

from betterhalf.tasks.reward_replies import read_reply
from betterhalf.tasks.reward_sum import Summand, SumRule, add_up, standardised
from betterhalf.tasks.reward_values import read_rewards

PLAIN = SumRule(normalise="none", scale=1.0, clip=None)


def summand(weight: float, *values: float) -> Summand:
    return Summand(weight=weight, values_G=values)


def test_weights_scale_and_bounds_apply_in_this_order() -> None:
    summands = [summand(1.0, 1.0, 0.0, -2.0), summand(0.5, 2.0, 4.0, 0.0)]
    assert add_up(summands, PLAIN) == [2.0, 2.0, -2.0]
    assert add_up(summands, SumRule(normalise="none", scale=3.0, clip=None)) == [6.0, 6.0, -6.0]
    assert add_up(summands, SumRule(normalise="none", scale=3.0, clip=(-1.0, 5.0))) == [5.0, 5.0, -1.0]


def test_a_standardised_reward_has_mean_0_and_sample_deviation_1() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    mean, std = statistics.fmean(values), statistics.stdev(values)
    assert standardised(values) == pytest.approx([(value - mean) / std for value in values], rel=1e-8)
    assert statistics.stdev(standardised(values)) == pytest.approx(1.0, rel=1e-8)


def test_equal_values_and_single_siblings_are_standardised_to_0() -> None:
    assert standardised([0.1] * 3) == [0.0] * 3
    assert standardised([5.0]) == [0.0]


def test_normalisation_makes_rewards_of_any_size_count_alike() -> None:
    """Without it, the large reward decides alone; with it, opposite orders of siblings cancel."""
    summands = [summand(1.0, 1000.0, 2000.0, 3000.0), summand(1.0, 0.3, 0.2, 0.1)]
    assert add_up(summands, PLAIN) == pytest.approx([1000.3, 2000.2, 3000.1])
    group = SumRule(normalise="group", scale=1.0, clip=None)
    assert add_up(summands, group) == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    weighted = [summands[0], summand(3.0, 0.3, 0.2, 0.1)]
    assert add_up(weighted, group) == pytest.approx([2.0, 0.0, -2.0], abs=1e-6)


def test_components_add_up_unless_they_name_the_reward() -> None:
    reply = read_rewards([{"form": 0.25, "right": 1}, {"form": 0.5, "reward": 3.0}, True], 3)
    scored = read_reply(reply, 3, error_reward=-1.0)
    assert scored.values_G == [1.25, 3.0, 1.0]
    assert scored.components == {"form": [0.25, 0.5], "right": [1.0]}
    assert sorted(scored.summands) == [[0.0, 3.0, 1.0], [0.25, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert not scored.failures


def test_a_failed_sibling_gets_the_error_reward_and_the_others_keep_theirs() -> None:
    scored = read_reply(read_rewards([1.0, "1", {"a": float("nan")}, None], 4), 4, error_reward=-2.0)
    assert scored.values_G == [1.0, -2.0, -2.0, -2.0]
    assert scored.failures == {"wrong_type": 2, "not_finite": 1}
    assert scored.messages["wrong_type"] == "a reward is '1' (str), not a number"
    assert scored.messages["not_finite"] == "component 'a' is nan"


@pytest.mark.parametrize(
    "reply",
    [
        {"rewards": [1.0, 2.0]},
        {"rewards": [{"value": 1.0, "components": {}}]},
        {"rewards": "ab"},
        {"rewards": [{"value": "x", "components": {}}] * 2},
        {"error": "unheard of", "message": ""},
        {},
    ],
)
def test_a_forged_reply_counts_as_a_crash(reply: dict[str, object]) -> None:
    scored = read_reply(reply, 2, error_reward=0.5)
    assert scored.values_G == [0.5, 0.5]
    assert scored.failures == {"crash": 2}
