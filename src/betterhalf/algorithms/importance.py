"""Importance ratios at every level, and the treatment of those that are too large or too small.

Everything is FP32 (or float64 when the logprobs are): the log-ratio is summed first, bounded to +-20 once, and only
then exponentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.config.schema import RatioConfig
from betterhalf.types import RatioLevel, RatioTreatment


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Importance weights of the tokens of one micro-batch; a sequence's weight is repeated at each of its tokens."""

    raw_C: Tensor
    """float32 [C]: the ratio before its treatment."""
    weight_C: Tensor
    """float32 [C]: after truncation and masking."""
    kept_C: Tensor
    """bool [C]: not dropped by a mask."""
    truncated_C: Tensor
    """bool [C]: capped at `upper`."""
    bounded_C: Tensor
    """bool [C]: the log-ratio left +-20 and was bounded."""


def importance_weights(
    config: RatioConfig, numerator_C: Tensor, denominator_C: Tensor, sequence_index_C: Tensor, num_sequences: int
) -> Weights:
    """Return the ratio of two policies at the level of `config`, and its weight; the surrogate applies `clip` itself.

    The gradient with respect to the numerator's logprobs is weight x (gradient of the token's logprob) at every level:
    a sequence's ratio is repeated at each of its tokens, but each token carries only its own part of the gradient.
    A bounded or truncated weight is a constant, as is the weight of 1 that a mask without `keep_weight` gives.

    Args:
        config: level, treatment and bounds.
        numerator_C: [C] logprobs.
        denominator_C: [C] logprobs, held constant.
        sequence_index_C: int64 [C].
        num_sequences: S.
    """
    log_ratio_C = ops.log_ratio(numerator_C, denominator_C.detach())
    level_C = _LEVELS[config.level](log_ratio_C.detach(), sequence_index_C, num_sequences)
    value_C, bounded_C = ops.bounded_exp(level_C)
    # exp(x - x) is 1 and carries the gradient of x.
    raw_C = value_C * torch.exp((log_ratio_C - log_ratio_C.detach()) * ~bounded_C)
    weight_C, kept_C, truncated_C = _TREATMENTS[config.treatment](config, raw_C)
    return Weights(raw_C=raw_C, weight_C=weight_C, kept_C=kept_C, truncated_C=truncated_C, bounded_C=bounded_C)


def treated(config: RatioConfig, ratio: Tensor) -> Tensor:
    """Return ratios of any shape after truncation and masking."""
    return _TREATMENTS[config.treatment](config, ratio)[0]


def leaves_trust_region(probability_gap: float, current_C: Tensor, behavior_C: Tensor, advantages_C: Tensor) -> Tensor:
    """Return the tokens that the update would move further out of the trust region, bool [C].

    pi moves away from mu, and abs(pi - mu) already exceeds `probability_gap` (DPPO, arXiv 2602.04879).
    """
    gap_C = current_C.detach().exp() - behavior_C.exp()
    return (gap_C * advantages_C > 0) & (gap_C.abs() > probability_gap)


def _no_ratio(log_ratio_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> Tensor:
    return torch.zeros_like(log_ratio_C)


def _token(log_ratio_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> Tensor:
    return log_ratio_C


def _sequence(log_ratio_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> Tensor:
    return ops.segment_sum(log_ratio_C, sequence_index_C, num_sequences)[sequence_index_C]


def _geometric_mean(log_ratio_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> Tensor:
    return ops.segment_mean(log_ratio_C, sequence_index_C, num_sequences)[sequence_index_C]


_LEVELS: dict[RatioLevel, Callable[[Tensor, Tensor, int], Tensor]] = {
    "none": _no_ratio,
    "token": _token,
    "sequence": _sequence,
    "geometric_mean": _geometric_mean,
}

Treated = tuple[Tensor, Tensor, Tensor]


def _raw(config: RatioConfig, ratio_C: Tensor) -> Treated:
    everything = torch.ones_like(ratio_C, dtype=torch.bool)
    return ratio_C, everything, ~everything


def _truncate(config: RatioConfig, ratio_C: Tensor) -> Treated:
    assert config.upper is not None
    everything = torch.ones_like(ratio_C, dtype=torch.bool)
    return ratio_C.clamp(max=config.upper), everything, ratio_C > config.upper


def _mask(config: RatioConfig, ratio_C: Tensor) -> Treated:
    kept_C = torch.ones_like(ratio_C, dtype=torch.bool)
    if config.lower is not None:
        kept_C = kept_C & (ratio_C >= config.lower)
    if config.upper is not None:
        kept_C = kept_C & (ratio_C <= config.upper)
    weight_C = ratio_C if config.keep_weight else torch.ones_like(ratio_C)
    return weight_C * kept_C, kept_C, torch.zeros_like(kept_C)


_TREATMENTS: dict[RatioTreatment, Callable[[RatioConfig, Tensor], Treated]] = {
    "raw": _raw,
    "truncate": _truncate,
    "mask": _mask,
    "clip": _raw,
}
