"""Intervals of means over prompts have their nominal coverage, and the gap its importance weights."""

from __future__ import annotations

import math

import pytest
import torch

from betterhalf.diagnostics.deployment_gap import DeploymentGap, deployment_gap
from betterhalf.diagnostics.estimates import Estimate, mean_estimates


def intervals(values_RP: torch.Tensor, confidence: float = 0.95) -> list[Estimate]:
    """Return the interval of the mean of each row."""
    named = {str(index): row.tolist() for index, row in enumerate(values_RP)}
    return list(mean_estimates(named, resamples=500, confidence=confidence, seed=0).values())


@pytest.mark.parametrize(
    ("prompts", "samples", "spread"),
    [(20, 8, (1.0, 1.0)), (40, 1, (3.0, 1.0)), (30, 4, (6.0, 1.0)), (100, 8, (0.3, 0.3))],
)
def test_intervals_of_avg_at_k_cover_the_mean_over_all_prompts(
    prompts: int, samples: int, spread: tuple[float, float]
) -> None:
    """Prompts of Beta-distributed difficulty, with `samples` completions each; 400 repetitions."""
    torch.manual_seed(0)
    chances = torch.distributions.Beta(*spread).sample((400, prompts)).double()
    values = torch.distributions.Binomial(samples, chances).sample() / samples
    truth = spread[0] / sum(spread)
    found = intervals(values)
    covered = sum(estimate.low <= truth <= estimate.high for estimate in found) / len(found)
    assert 0.925 <= covered <= 0.985, covered
    assert all(0 <= estimate.low <= estimate.value <= estimate.high <= 1 for estimate in found)


def test_where_every_prompt_is_solved_the_bound_is_that_of_the_binomial() -> None:
    solved, failed = intervals(torch.tensor([[1.0] * 12, [0.0] * 12], dtype=torch.float64))
    assert (solved.value, solved.high, failed.value, failed.low) == (1, 1, 0, 0)
    # A policy that solves a share p shows 12 of 12 with probability p^12.
    assert solved.low == pytest.approx(0.025 ** (1 / 12)) and failed.high == pytest.approx(1 - solved.low)


def test_a_higher_confidence_gives_a_wider_interval_and_one_prompt_none() -> None:
    torch.manual_seed(1)
    values = torch.rand(1, 30, dtype=torch.float64)
    (narrow,), (wide,) = intervals(values, 0.5), intervals(values, 0.99)
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high
    (single,) = intervals(torch.tensor([[0.5]], dtype=torch.float64))
    assert single.value == 0.5 and math.isnan(single.low) and math.isnan(single.high)
    assert str(single) == "0.500"


def test_rewards_beyond_one_have_symmetric_intervals() -> None:
    (found,) = intervals(torch.tensor([[-1.0, 2.0, 3.0, 0.0]], dtype=torch.float64))
    assert found.value == 1 and found.high - found.value == pytest.approx(found.value - found.low)
    # Student's t of 3 degrees of freedom times s / sqrt(P), with the bootstrap's own noise
    assert found.high - 1 == pytest.approx(3.1824 * 1.8257 / 2, rel=0.1)


# -- the deployment gap


def gap(rewards: list[list[float]], log_ratios: list[list[float]], resamples: int = 500) -> DeploymentGap:
    return deployment_gap(rewards, log_ratios, resamples=resamples, confidence=0.95, seed=0)


def test_the_weighted_accuracy_is_that_of_hand_computed_weights() -> None:
    found = gap([[1.0, 0.0], [1.0, 0.0]], [[math.log(2), 0.0], [0.0, math.log(0.5)]])
    # weights 2, 1, 1, 0.5: (2 + 1) / 4.5, and an effective sample size of 4.5^2 / (4 + 1 + 1 + 0.25)
    assert found.trainer_accuracy == pytest.approx(3 / 4.5, rel=1e-12) and found.accuracy == 0.5
    assert found.gap.value == pytest.approx(3 / 4.5 - 0.5, rel=1e-12)
    assert found.ess_fraction == pytest.approx(4.5**2 / 6.25 / 4, rel=1e-12)
    assert found.reliable


def test_equal_policies_have_a_gap_of_exactly_zero() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(9, 8).tolist()
    found = gap(rewards, [[0.0] * 8 for _ in range(9)])
    assert (found.gap.value, found.gap.low, found.gap.high) == (0.0, 0.0, 0.0)
    assert found.ess_fraction == 1 and found.trainer_accuracy == found.accuracy


def test_rewards_that_are_all_equal_give_no_interval() -> None:
    found = gap([[0.0, 0.0], [0.0, 0.0]], [[0.1, 0.0], [0.0, -0.1]])
    assert found.gap.value == 0 and math.isnan(found.gap.low) and math.isnan(found.gap.high)


def test_a_common_factor_of_the_weights_cancels_without_overflow() -> None:
    rewards, log_ratios = [[1.0, 0.0], [0.5, 1.0]], [[0.3, -0.2], [0.1, 0.7]]
    shifted = gap(rewards, [[value + 2000 for value in row] for row in log_ratios])
    assert shifted.gap.value == pytest.approx(gap(rewards, log_ratios).gap.value, abs=1e-10)


def test_a_few_heavy_weights_make_the_estimate_unreliable() -> None:
    found = gap([[1.0, 0.0, 0.0, 0.0]] * 4, [[8.0, 0.0, 0.0, 0.0], *[[0.0] * 4] * 3])
    assert found.ess_fraction < 0.1 and not found.reliable


def test_intervals_of_the_gap_cover_the_difference_of_the_policies() -> None:
    """Each prompt has two answers: mu picks the right one with chance m, pi with chance p; 300 repetitions."""
    torch.manual_seed(0)
    covered, truth = 0, 0.0
    prompts, samples, repetitions = 40, 8, 300
    for _ in range(repetitions):
        mu = torch.rand(prompts, 1).mul(0.8).add(0.1).double()
        pi = (mu + 0.05).expand(prompts, samples)
        right = torch.rand(prompts, samples) < mu
        log_ratios = torch.where(right, (pi / mu).log(), ((1 - pi) / (1 - mu)).log())
        found = gap(right.double().tolist(), log_ratios.tolist(), resamples=200)
        covered += found.gap.low <= 0.05 <= found.gap.high
        truth += found.gap.value / repetitions
    assert truth == pytest.approx(0.05, abs=0.003)
    assert 0.9 <= covered / repetitions <= 0.99
