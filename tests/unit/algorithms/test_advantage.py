"""Advantages of a group of siblings, compared with values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from betterhalf.algorithms.advantage import (
    check_dynamic_sampling,
    check_group_size,
    equal_rewards,
    group_advantages,
    overlong_penalty,
    rollout_advantages,
    zero_advantage_groups,
)
from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.presets import PRESETS
from betterhalf.config.schema import AlgorithmConfig
from betterhalf.errors import ConfigError, RewardError
from betterhalf.types import AdvantageKind, Completion, Prompt, Rollout, RolloutGroup

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
STD = math.sqrt(1 / 3)
"""Sample standard deviation of the first group: sqrt(4 x 0.25 / 3). The second group's is 1."""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group_mean", [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]),
        ("group_standardised", [[0.5 / STD, -0.5 / STD, -0.5 / STD, 0.5 / STD], [1.5, -0.5, -0.5, -0.5]]),
        ("leave_one_out", [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2.0, -2 / 3, -2 / 3, -2 / 3]]),
        ("raw", [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]]),
    ],
)
def test_advantages_by_hand(kind: AdvantageKind, expected: list[list[float]]) -> None:
    advantages = group_advantages(REWARDS, kind)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["group_mean", "group_standardised", "leave_one_out"])
def test_equal_rewards_give_exactly_zero_whatever_their_mean_rounds_to(kind: AdvantageKind) -> None:
    # The float64 mean of three times 0.1 is not 0.1.
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.mean() != 0.1
    assert group_advantages(rewards, kind).tolist() == [[0.0, 0.0, 0.0]]


def test_equal_rewards_are_compared_exactly() -> None:
    rewards = torch.tensor([[1.0, 1.0], [0.5, 0.5 + 1e-17], [0.5, 0.5 + 2e-16]], dtype=torch.float64)
    assert equal_rewards(rewards).tolist() == [True, True, False]


def test_zero_advantage_groups_are_those_without_any_signal() -> None:
    advantages = torch.tensor([[0.0, 0.0], [0.0, 1e-30], [-1.0, 1.0]])
    assert zero_advantage_groups(advantages).tolist() == [True, False, False]


@pytest.mark.parametrize("kind", ["group_mean", "group_standardised", "leave_one_out"])
def test_a_group_of_one_has_no_baseline(kind: AdvantageKind) -> None:
    with pytest.raises(ConfigError, match=r"group_size=1 .*algorithm\.advantage=raw"):
        check_group_size(kind, 1)
    with pytest.raises(ConfigError):
        group_advantages(torch.ones(3, 1), kind)


def test_dynamic_sampling_would_leave_out_every_group_of_one() -> None:
    algorithm = resolve_algorithm(AlgorithmConfig(preset="reinforce", dynamic_sampling=True))
    with pytest.raises(ConfigError, match=r"group_size=1 is every group.*algorithm\.dynamic_sampling=false"):
        check_dynamic_sampling(algorithm, 1)
    check_dynamic_sampling(algorithm, 2)


def test_raw_takes_a_group_of_one() -> None:
    assert group_advantages(torch.ones(2, 1), "raw").tolist() == [[1.0], [1.0]]


def test_rewards_that_are_not_finite_are_refused_and_counted() -> None:
    with pytest.raises(RewardError, match="2 of 4 rewards"):
        group_advantages(torch.tensor([[0.0, math.nan], [math.inf, 1.0]]), "group_mean")


def test_overlong_penalty_falls_over_the_buffer_only() -> None:
    # Limit 10, buffer 4: no penalty up to 6 tokens, then a quarter for each token.
    lengths = torch.tensor([1, 6, 7, 8, 10])
    assert overlong_penalty(lengths, 10, 4, 1.0).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]
    assert overlong_penalty(lengths, 10, 4, 0.5).tolist() == [0.0, 0.0, -0.125, -0.25, -0.5]
    assert overlong_penalty(lengths, 10, 0, 1.0).tolist() == [0.0] * 5


def test_dapo_with_rewards_of_0_and_1_has_the_advantages_of_rewards_of_minus_1_and_1() -> None:
    # right and short, right at the limit, wrong and short, wrong at the limit
    right, lengths = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([[10, 100, 10, 100]])
    ours = right + overlong_penalty(lengths, 100, 20, PRESETS["dapo"].overlong_factor)
    theirs = 2 * right - 1 + overlong_penalty(lengths, 100, 20, 1.0)
    found = group_advantages(ours, "group_standardised")
    assert found[0].tolist() == pytest.approx([1.16, 0.39, -0.39, -1.16], abs=0.005)
    torch.testing.assert_close(found, group_advantages(theirs, "group_standardised"))


def test_overlong_buffer_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"overlong_buffer=11 exceeds sampling\.max_tokens=10"):
        overlong_penalty(torch.tensor([1]), 10, 11, 0.5)


def a_group(*siblings: tuple[float, int, bool]) -> RolloutGroup:
    """Return a group of siblings with these rewards and lengths; True for one that ended at the limit."""
    prompt = Prompt(prompt_id="", text="", token_ids=(1,), answer="")
    rollouts = [
        Rollout(
            prompt=prompt,
            completion=Completion(
                token_ids=(2,) * length,
                behavior_logprobs=(-1.0,) * length,
                finish_reason="length" if cut else "stop",
                policy_version=0,
            ),
            text="",
            reward=reward,
        )
        for reward, length, cut in siblings
    ]
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def advantages_with(group: RolloutGroup, **choices: object) -> list[float]:
    algorithm = resolve_algorithm(AlgorithmConfig.model_validate(choices))
    return rollout_advantages([group], algorithm, max_tokens=10)


def test_a_masked_completion_has_no_advantage_and_stays_in_the_baseline() -> None:
    group = a_group((1.0, 4, False), (0.0, 10, True), (1.0, 10, False), (0.0, 3, False))
    assert advantages_with(group) == [0.5, -0.5, 0.5, -0.5]
    assert advantages_with(group, mask_truncated=True) == [0.5, 0.0, 0.5, -0.5]
    assert advantages_with(group, mask_truncated=True, advantage="raw") == [1.0, 0.0, 1.0, 0.0]


def test_the_length_penalty_is_a_share_of_the_limit_by_hand() -> None:
    group = a_group((1.0, 5, False), (1.0, 10, True), (0.0, 2, False), (0.0, 3, False))
    # 0.2 x length / 10: penalties 0.1, 0.2, 0.04, 0.06; rewards 0.9, 0.8, -0.04, -0.06, mean 0.4
    assert advantages_with(group, length_penalty=0.2) == pytest.approx([0.5, 0.4, -0.44, -0.46])
    # raw: no baseline; together with the overlong penalty of 0.5 x (length - 6) / 4 above six tokens
    together = advantages_with(group, length_penalty=0.2, overlong_buffer=4, advantage="raw")
    assert together == pytest.approx([0.9, 0.3, -0.04, -0.06])


def test_the_length_penalty_alone_trains_on_length_except_in_groups_that_only_fill_a_step() -> None:
    equal = a_group((1.0, 2, False), (1.0, 4, False))
    assert advantages_with(equal, length_penalty=1.0) == pytest.approx([0.1, -0.1])
    assert advantages_with(equal, length_penalty=1.0, dynamic_sampling=True) == [0.0, 0.0]


def test_a_negative_length_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="length_penalty"):
        AlgorithmConfig(length_penalty=-0.1)
