"""The mismatch between trainer and engine, from the logprobs that both assign to the same tokens.

`log_ratio` is always trainer minus behavior, raw and in float64: in float32, exp(d) - 1 - d is noise below 1e-8.
With pi the trainer's and mu the engine's policy and tokens drawn from mu, the means of

    k1 = -log_ratio     k2 = log_ratio^2 / 2     k3 = exp(log_ratio) - 1 - log_ratio

estimate KL(mu || pi) (J. Schulman, "Approximating KL divergence", 2020): k1 is unbiased, but signed and noisy; k2 has a
bias of third order; k3 is unbiased, never negative, and has little variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.diagnostics.experts import ExpertLayer
from betterhalf.errors import EngineNumericsError, NumericsError, RunError

_SERIES_BELOW = 0.02
"""Magnitude of d below which exp(d) - 1 - d is summed as a series: the subtraction would lose its leading digits."""
_SERIES = tuple(1 / math.factorial(power) for power in range(9, 1, -1))
"""Coefficients of d^9 to d^2; further terms are below 1e-17 of the sum."""

ACCIDENT = 3.0
"""Magnitude of the log-ratio, in nats, from which a token counts as an accident: a factor of 20 in its probability."""

PROBABILITY_EDGES = (0.0, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0)
"""Edges of the bins of mu. Rounding changes rare tokens most, and most tokens of a trained policy are above 0.9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GapBin:
    """Mismatch of the tokens in one bin of probabilities or positions. In an empty bin, all statistics are 0."""

    lower: float
    """Lower edge, inclusive."""
    upper: float
    """Upper edge, exclusive; inclusive in the last bin."""
    tokens: int
    """Number of tokens."""
    k3: float
    """Mean of k3, in nats."""
    log_ratio_mean: float
    """Mean of the log-ratio, in nats and signed: the part that adds up over a long completion."""
    log_ratio_std: float
    """Standard deviation of the log-ratio, in nats."""
    prob_gap_mean_abs: float
    """Mean of abs(pi - mu)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GapProfile:
    """Mismatch of a step by probability, position, completion and layer, which means over all tokens hide."""

    by_probability: tuple[GapBin, ...]
    """Bins of mu, with the edges `PROBABILITY_EDGES`."""
    by_position: tuple[GapBin, ...]
    """Bins of the position in the completion, with the edges `position_edges`."""
    completions: tuple[tuple[int, float], ...]
    """[S] (length, summed log-ratio) of each sequence with tokens."""
    by_expert_layer: tuple[ExpertLayer, ...] = ()
    """Routing in each layer with experts; empty without any."""


def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(d) - 1 - d elementwise in float64, accurate to the last digits for any d; any shape."""
    d = log_ratio.double()
    series = torch.zeros_like(d)
    for coefficient in _SERIES:
        series = series * d + coefficient
    return torch.where(d.abs() < _SERIES_BELOW, series * d * d, torch.expm1(d) - d)


def mismatch_metrics(
    trainer_logprobs_C: Tensor, behavior_logprobs_C: Tensor, sequence_index_C: Tensor, num_sequences: int
) -> dict[str, float]:
    """Return every `mismatch/` metric of a step; the metrics catalogue documents them.

    Args:
        trainer_logprobs_C: [C], log pi before any update.
        behavior_logprobs_C: [C], log mu.
        sequence_index_C: int64 [C], which sequence each token belongs to; sequences without tokens do not count.
        num_sequences: number of sequences, S.

    Raises:
        EngineNumericsError: behavior logprobs are not finite.
        NumericsError: trainer logprobs are not finite.
        ValueError: there are no tokens.
    """
    trainer_C, behavior_C = _checked(trainer_logprobs_C, behavior_logprobs_C)
    d_C = ops.log_ratio(trainer_C, behavior_C)
    lengths_S = ops.segment_sum(torch.ones_like(d_C), sequence_index_C, num_sequences)
    present_S = lengths_S > 0
    d_S = ops.segment_sum(d_C, sequence_index_C, num_sequences)[present_S]
    values = {
        **_token_metrics(d_C, trainer_C, behavior_C),
        **_sequence_metrics(d_S, lengths_S[present_S]),
        "tokens": float(d_C.numel()),
    }
    return {f"mismatch/{name}": value for name, value in values.items()}


def mismatch_bins(
    trainer_logprobs_C: Tensor, behavior_logprobs_C: Tensor, by_C: Tensor, edges: Sequence[float]
) -> tuple[GapBin, ...]:
    """Return the mismatch in bins of a quantity known for each token.

    Args:
        trainer_logprobs_C: [C].
        behavior_logprobs_C: [C].
        by_C: [C], the quantity: mu (`behavior_logprobs_C.exp()`) or `completion_positions`.
        edges: ascending; one bin between each two neighbours. Tokens outside are left out.

    Raises:
        EngineNumericsError, NumericsError, ValueError: as in `mismatch_metrics`.
    """
    trainer_C, behavior_C = _checked(trainer_logprobs_C, behavior_logprobs_C)
    by_C, bins = by_C.double(), []
    for number, (lower, upper) in enumerate(pairwise(edges)):
        below_C = by_C <= upper if number == len(edges) - 2 else by_C < upper
        inside_C = (by_C >= lower) & below_C
        bins.append(_bin(lower, upper, trainer_C[inside_C], behavior_C[inside_C]))
    return tuple(bins)


def position_edges(max_length: int) -> tuple[float, ...]:
    """Return the edges of the position bins: 0, 1, 2, 4, ... up to the first power of two that is >= `max_length`."""
    return (0.0, *(2.0**power for power in range(max(0, (max_length - 1).bit_length()) + 1)))


def ess_fraction(sequence_log_ratio_S: Tensor) -> float:
    """Return (sum w)^2 / (S sum w^2) of the weights w = exp(d), between 1/S and 1.

    The sums are in log space, because exp(d) of a long sequence may overflow.
    """
    d_S = sequence_log_ratio_S.double()
    return math.exp(float(2 * d_S.logsumexp(0) - (2 * d_S).logsumexp(0))) / len(d_S)


def gap_profile(
    trainer_logprobs_C: Tensor,
    behavior_logprobs_C: Tensor,
    sequence_index_C: Tensor,
    num_sequences: int,
    max_length: int,
) -> GapProfile:
    """Return the mismatch by probability, by position and by completion.

    Args:
        trainer_logprobs_C, behavior_logprobs_C, sequence_index_C, num_sequences: as in `mismatch_metrics`.
        max_length: upper limit of the completion lengths.

    Raises:
        EngineNumericsError, NumericsError, ValueError: as in `mismatch_metrics`.
    """
    trainer_C, behavior_C = _checked(trainer_logprobs_C, behavior_logprobs_C)
    positions_C = completion_positions(sequence_index_C)
    d_C = ops.log_ratio(trainer_C, behavior_C)
    lengths_S = ops.segment_sum(torch.ones_like(sequence_index_C), sequence_index_C, num_sequences)
    d_S = ops.segment_sum(d_C, sequence_index_C, num_sequences)
    present_S = lengths_S > 0
    return GapProfile(
        by_probability=mismatch_bins(trainer_C, behavior_C, behavior_C.exp(), PROBABILITY_EDGES),
        by_position=mismatch_bins(trainer_C, behavior_C, positions_C, position_edges(max_length)),
        completions=tuple(zip(lengths_S[present_S].tolist(), d_S[present_S].tolist(), strict=True)),
    )


def completion_positions(sequence_index_C: Tensor) -> Tensor:
    """Return the position of each token in its completion, from 0, int64 [C]; tokens of a sequence are contiguous."""
    places_C = torch.arange(len(sequence_index_C), device=sequence_index_C.device)
    first_C = torch.ones_like(sequence_index_C, dtype=torch.bool)
    first_C[1:] = sequence_index_C[1:] != sequence_index_C[:-1]
    return places_C - (places_C * first_C).cummax(0).values


def _checked(trainer_logprobs: Tensor, behavior_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64; raise an error if there are no tokens or if a value is not finite."""
    if trainer_logprobs.numel() == 0:
        raise ValueError("there are no tokens to measure the mismatch on; pass those of at least one completion.")
    _refuse_non_finite(
        behavior_logprobs,
        EngineNumericsError,
        "behavior",
        "look for overflow in the engine, or run it with precision=fp32",
    )
    _refuse_non_finite(
        trainer_logprobs,
        NumericsError,
        "trainer",
        "look for overflow in the forward pass, or train with precision=fp32",
    )
    return trainer_logprobs.detach().double(), behavior_logprobs.detach().double()


def _refuse_non_finite(logprobs: Tensor, error: type[RunError], side: str, fix: str) -> None:
    if bad := int((~logprobs.isfinite()).sum()):
        raise error(f"{bad} of {logprobs.numel()} {side} logprobs are not finite; {fix}.")


def _token_metrics(d_C: Tensor, trainer_C: Tensor, behavior_C: Tensor) -> dict[str, float]:
    gap_C = behavior_C.exp() * torch.expm1(d_C)
    return {
        "k1/mean": 0.0 - float(d_C.mean()),
        "k2/mean": float(d_C.square().mean()) / 2,
        "k3/mean": float(k3(d_C).mean()),
        "prob_gap/mean_abs": float(gap_C.abs().mean()),
        "prob_gap/std_abs": float(gap_C.abs().std(correction=0)),
        "prob_gap/p99_abs": _quantile(gap_C.abs(), 0.99),
        "prob_gap/max": float(gap_C.max()),
        "prob_gap/min": float(gap_C.min()),
        "log_ratio/mean": float(d_C.mean()),
        "log_ratio/mean_abs": float(d_C.abs().mean()),
        "log_ratio/std": float(d_C.std(correction=0)),
        "log_ratio/max": float(d_C.max()),
        "log_ratio/min": float(d_C.min()),
        "log_ratio/p99_abs": _quantile(d_C.abs(), 0.99),
        "log_ratio/max_abs": float(d_C.abs().max()),
        "accident_fraction": _fraction(d_C < -ACCIDENT),
        "accident_fraction_above": _fraction(d_C > ACCIDENT),
        "chi2_token": float(torch.expm1(d_C).square().mean()),
        "pearson": _pearson(trainer_C.exp(), behavior_C.exp()),
    }


def _sequence_metrics(d_S: Tensor, lengths_S: Tensor) -> dict[str, float]:
    return {
        "sequence_log_ratio/mean": float(d_S.mean()),
        "sequence_log_ratio/std": float(d_S.std(correction=0)),
        "sequence_log_ratio/p1": _quantile(d_S, 0.01),
        "sequence_log_ratio/p99": _quantile(d_S, 0.99),
        "slope_per_1k": 1000 * _slope(lengths_S, d_S),
        "ess_fraction": ess_fraction(d_S),
    }


def _fraction(chosen_C: Tensor) -> float:
    return float(chosen_C.double().mean())


def _quantile(values: Tensor, share: float) -> float:
    """Return a quantile, linear between the two nearest ranks; torch.quantile refuses more than 2^24 values."""
    ordered = values.sort().values
    rank = share * (len(ordered) - 1)
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return float(low + (high - low) * (rank - math.floor(rank)))


def _slope(lengths_S: Tensor, d_S: Tensor) -> float:
    """Return the least-squares slope of d on length, in nats per token; through the origin if all lengths are equal."""
    if bool((lengths_S == lengths_S[0]).all()):
        return float(d_S.mean() / lengths_S[0])
    centred_S = lengths_S - lengths_S.mean()
    return float((centred_S * d_S).sum() / centred_S.square().sum())


def _pearson(x: Tensor, y: Tensor) -> float:
    """Return the correlation; where one side is constant, 1 if both are equal and else 0."""
    x_centred, y_centred = x - x.mean(), y - y.mean()
    scale = float(x_centred.norm() * y_centred.norm())
    if scale == 0.0:
        return float(torch.equal(x, y))
    return float((x_centred * y_centred).sum()) / scale


def _bin(lower: float, upper: float, trainer: Tensor, behavior: Tensor) -> GapBin:
    d = ops.log_ratio(trainer, behavior)
    gap = behavior.exp() * torch.expm1(d)

    def mean(values: Tensor) -> float:
        return float(values.mean()) if values.numel() else 0.0

    return GapBin(
        lower=lower,
        upper=upper,
        tokens=d.numel(),
        k3=mean(k3(d)),
        log_ratio_mean=mean(d),
        log_ratio_std=math.sqrt(mean((d - mean(d)).square())),
        prob_gap_mean_abs=mean(gap.abs()),
    )
