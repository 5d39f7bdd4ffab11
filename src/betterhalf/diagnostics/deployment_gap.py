"""The deployment gap: accuracy of the trainer's policy (pi) minus that of the engine's samples (mu).

The engine samples from mu, and its completions are weighted by pi/mu of the whole completion. The weighted mean divided
by the mean weight (self-normalised importance sampling) estimates the accuracy that completions sampled from pi would
have; it is consistent, with a bias of the order of one over the effective sample size. If a few weights dominate, the
estimate depends on a few completions: with an effective sample size below `RELIABLE_ESS` it is called unreliable.

Axes: P prompts, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.diagnostics.estimates import Estimate, critical_value, standard_errors

RELIABLE_ESS = 0.5
"""Smallest effective sample size, as a share of the completions, of a reliable estimate."""

_Results = Sequence[Sequence[float]]
"""One sequence for each prompt, with a number for each of its completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentGap:
    """Accuracy of both policies on the same prompts."""

    accuracy: float
    """Mean reward of the completions as sampled, from mu."""
    trainer_accuracy: float
    """Mean reward under pi, estimated from the same completions by importance weights."""
    gap: Estimate
    """`trainer_accuracy` minus `accuracy`, with an interval over prompts."""
    ess_fraction: float
    """Effective sample size of the weights, as a share of the completions."""

    @property
    def reliable(self) -> bool:
        """True if the effective sample size is at least `RELIABLE_ESS`; else few completions decide the estimate."""
        return self.ess_fraction >= RELIABLE_ESS


def deployment_gap(
    rewards: _Results, log_ratios: _Results, *, resamples: int, confidence: float, seed: int
) -> DeploymentGap:
    """Estimate the gap from the rewards and the log-ratios of the engine's completions.

    Args:
        rewards: rewards of the completions of each prompt.
        log_ratios: log pi - log mu of each whole completion, in nats, in the same order.
        resamples: number of bootstrap resamples of the prompts.
        confidence: level of the interval.
        seed: seed of the resamples.
    """
    largest = max(value for row in log_ratios for value in row)
    # A common factor cancels; with the largest weight at 1 nothing overflows.
    weights = [torch.tensor(row, dtype=torch.float64).sub(largest).exp() for row in log_ratios]
    values = [torch.tensor(row, dtype=torch.float64) for row in rewards]
    sums_P4 = torch.stack(
        [
            torch.stack([(weight * value).sum(), weight.sum(), value.sum(), torch.tensor(float(len(value))).double()])
            for weight, value in zip(weights, values, strict=True)
        ]
    )
    prompts = len(sums_P4)
    weighted, plain = _accuracies(sums_P4.sum(0, keepdim=True))
    error = standard_errors(
        lambda counts_BP: torch.sub(*_accuracies(counts_BP @ sums_P4)).unsqueeze(1), prompts, resamples, seed
    )
    gap, reach = float(weighted - plain), critical_value(confidence, prompts) * float(error)
    every, graded = torch.cat(weights), torch.cat(values)
    if bool((graded == graded[0]).all()) and bool((every != 1).any()):
        reach = torch.nan  # rewards that are all equal say nothing about the effect of the weights
    return DeploymentGap(
        accuracy=float(plain),
        trainer_accuracy=float(weighted),
        gap=Estimate(value=gap, low=gap - reach, high=gap + reach),
        ess_fraction=float(every.sum().square() / every.square().sum()) / len(every),
    )


def _accuracies(sums_B4: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted and plain mean from the sums of weight times reward, weight, reward and 1."""
    return sums_B4[:, 0] / sums_B4[:, 1], sums_B4[:, 2] / sums_B4[:, 3]
