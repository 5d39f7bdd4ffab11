"""The budget: the effective sample size that the mismatch leaves at a given completion length.

Lognormal algebra. Let the token log-ratio d = log pi - log mu have variance sigma2, and let correlation within a
completion scale the variance of its sum over L tokens to L sigma2 tau. Since the weights w = exp(sum d) have mean 1
under mu, sum d has mean -L sigma2 tau / 2 if it is normal, and

    E[w^2] = exp(L sigma2 tau)        ESS(L) = E[w]^2 / E[w^2] = exp(-L sigma2 tau)

so sequence-level importance weights are useless beyond a few times 1 / (sigma2 tau) tokens, however small the KL of
each token is. This is about such weights, not about learning: L sigma2 tau does not predict where an algorithm without
them breaks. docs/mismatch.md states how well the prediction holds, and where it fails.

Axes: C completion tokens, S sequences.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.diagnostics.logprob_gap import ess_fraction

ESS_FLOOR = 0.5
"""Share of effective samples below which the weights have lost half of the batch. It is not a published bound: verl and
others compute theirs from token weights or from truncated weights, which gives other values (docs/mismatch.md)."""

CORRELATION_FLOOR = 0.1
"""Lower bound of the fitted correlation, so that a few sums that agree by chance do not predict an unlimited length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Length up to which importance weights are useful, estimated from a sample of completions."""

    sigma2: float
    """Variance of the token log-ratio around its mean, in nats squared, over all C tokens."""
    correlation: float
    """tau: variance of the sequence sums, divided by that of the same number of independent tokens. 1 when tokens are
    independent, and where a single sequence, or no variance at all, does not determine it; never below
    `CORRELATION_FLOOR`."""
    predicted_ess: float
    """Share of effective samples (0 to 1) predicted for many completions with the lengths of these."""
    observed_ess: float
    """Share of effective samples that the weights of these completions have; with S completions, at least 1/S."""
    max_length: float
    """Length in tokens at which the prediction falls to the floor; infinite without mismatch."""


def fit_budget(
    log_ratio_C: Tensor, sequence_index_C: Tensor, num_sequences: int, *, floor: float = ESS_FLOOR
) -> Budget:
    """Fit variance and correlation of the token log-ratio, and predict the effective sample size from them.

    Args:
        log_ratio_C: [C], trainer minus behavior, at the same weights.
        sequence_index_C: int64 [C], which sequence each token belongs to; sequences without tokens do not count.
        num_sequences: number of sequences, S.
        floor: share of effective samples that defines `max_length`, between 0 and 1.

    Raises:
        ValueError: there are no tokens, or `floor` is not between 0 and 1.
    """
    if log_ratio_C.numel() == 0:
        raise ValueError("there are no tokens to fit the budget on; pass those of at least one completion.")
    if not 0 < floor < 1:
        raise ValueError(f"floor={floor} is not a share of effective samples; choose one between 0 and 1.")
    d_C = log_ratio_C.detach().double()
    lengths_S = ops.segment_sum(torch.ones_like(d_C), sequence_index_C, num_sequences)
    present_S = lengths_S > 0
    d_S, lengths_S = ops.segment_sum(d_C, sequence_index_C, num_sequences)[present_S], lengths_S[present_S]
    sigma2 = _variance(d_C)
    correlation = _correlation(d_S - lengths_S * d_C.mean(), lengths_S, sigma2)
    return Budget(
        sigma2=sigma2,
        correlation=correlation,
        predicted_ess=_ess_of_lengths(lengths_S, sigma2 * correlation),
        observed_ess=ess_fraction(d_S),
        max_length=_length_at(floor, sigma2 * correlation),
    )


def predict_ess(budget: Budget, length: float) -> float:
    """Return the predicted share of effective samples, exp(-L sigma2 tau), for completions of `length` tokens."""
    return math.exp(-length * budget.sigma2 * budget.correlation)


def budget_metrics(budget: Budget) -> dict[str, float]:
    """Return the `budget/` metrics of a step; the metrics catalogue documents them."""
    return {f"budget/{name}": value for name, value in asdict(budget).items()}


def _variance(d_C: Tensor) -> float:
    """Return the variance; exactly 0 where all values are equal, even if their mean is rounded."""
    if bool((d_C == d_C[0]).all()):
        return 0.0
    return float(d_C.var(correction=0))


def _correlation(centred_S: Tensor, lengths_S: Tensor, sigma2: float) -> float:
    """Return the variance of the centred sums, divided by that of independent tokens.

    The mean is estimated from the same tokens, which reduces the variance of the sums from sigma2 C to
    sigma2 (C - sum L^2 / C): to (S - 1) / S of it when all lengths are equal, to nothing for a single sequence.
    """
    tokens = float(lengths_S.sum())
    independent = sigma2 * (tokens - float(lengths_S.square().sum()) / tokens)
    if independent == 0.0:
        return 1.0
    return max(CORRELATION_FLOOR, float(centred_S.square().sum()) / independent)


def _ess_of_lengths(lengths_S: Tensor, rate: float) -> float:
    """Return 1 / mean(exp(L rate)) over the completion lengths, in log space, where exp(L rate) cannot overflow."""
    return math.exp(math.log(len(lengths_S)) - float((lengths_S * rate).logsumexp(0)))


def _length_at(floor: float, rate: float) -> float:
    return math.inf if rate == 0.0 else -math.log(floor) / rate
