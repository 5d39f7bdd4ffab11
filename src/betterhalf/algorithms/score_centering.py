"""Score Centering (arXiv 2609.20807): subtract from each token's score the mean score of the engine's distribution.

Where trainer (pi) and engine (mu) differ, a constant advantage A does not cancel: the expected gradient contains

    A sum_v mu_v f(pi_v / mu_v) grad log pi_v

over the vocabulary v, with f the treatment of the ratio. It has no information about the reward and adds up from step
to step; without a ratio (f = 1) it pulls pi towards mu, or away from it if A is negative. The term here has the
opposite gradient. The sum runs over the engine's K most likely tokens, H; outside of them, mu is taken to be pi, scaled
by rho = (1 - sum_H mu) / (1 - sum_H pi) to the same total.
Since sum_v pi_v grad log pi_v = 0, the tail can be written as a sum over H:

    sum_H (mu_v f(pi_v / mu_v) - rho f(1 / rho) pi_v) grad log pi_v
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.algorithms.importance import treated
from betterhalf.config.schema import RatioConfig

_LEAST_TAIL = 1e-6
"""Lower bound of the probability outside of H: below it, 1 minus a sum close to 1 is rounding noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Centering:
    """Expected score of each token's position."""

    expected_C: Tensor
    """[C]: value whose gradient is the expected score under the engine's distribution."""
    coefficients_C: Tensor
    """float64 [C], without a graph: sum of the absolute coefficients; 0 where trainer and engine agree."""
    tail_C: Tensor
    """float64 [C], without a graph: probability that the engine gives to tokens outside of the K most likely ones."""


def expected_score(surrogate: RatioConfig, current_top_CK: Tensor, behavior_top_CK: Tensor) -> Centering:
    """Return the expected score at each position.

    Args:
        surrogate: treatment of the ratio current/behavior, or level `none` for no ratio.
        current_top_CK: log pi of the engine's K most likely tokens, with a graph.
        behavior_top_CK: log mu of the same tokens.
    """
    pi_CK, mu_CK = current_top_CK.detach().double().exp(), behavior_top_CK.double().exp()
    tail_C = 1 - mu_CK.sum(-1)
    rho_C = tail_C.clamp(min=_LEAST_TAIL) / (1 - pi_CK.sum(-1)).clamp(min=_LEAST_TAIL)
    ratio_CK, _ = ops.bounded_exp(ops.log_ratio(current_top_CK.detach().double(), behavior_top_CK.double()))
    head_CK = mu_CK * _weight(surrogate, ratio_CK)
    scale_C = rho_C * _weight(surrogate, 1 / rho_C)
    coefficients_CK = head_CK - scale_C.unsqueeze(-1) * pi_CK
    return Centering(
        expected_C=(coefficients_CK.to(current_top_CK.dtype) * current_top_CK).sum(-1),
        coefficients_C=coefficients_CK.abs().sum(-1),
        tail_C=tail_C,
    )


def _weight(surrogate: RatioConfig, ratio: Tensor) -> Tensor:
    """Return the weight of a token with this ratio current/behavior."""
    return torch.ones_like(ratio) if surrogate.level == "none" else treated(surrogate, ratio)
