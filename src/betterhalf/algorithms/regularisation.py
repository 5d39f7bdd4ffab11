"""Regularisation: a KL penalty keeps the policy close to a reference policy, an entropy bonus keeps it random.

The penalty is on KL(pi || reference), estimated from the sampled tokens with x = log reference - log pi: k1 = -x,
k2 = x^2 / 2, k3 = exp(x) - 1 - x (Schulman 2020, "Approximating KL divergence").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import LossInputs, TokenTensors
from betterhalf.types import KlEstimator


@dataclass(frozen=True, slots=True, kw_only=True)
class Regularisation:
    """Terms of the loss of one micro-batch besides the surrogate, aggregated as the surrogate is."""

    kl_loss: Tensor
    """Scalar, with a graph: the KL penalty; 0 without one."""
    entropy_bonus: Tensor
    """Scalar, with a graph: the entropy bonus, which is subtracted; 0 without one."""
    bounded_C: Tensor
    """bool [C]: tokens whose log-ratio to the reference was bounded."""


_ESTIMATORS: dict[KlEstimator, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: -x,
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: torch.expm1(x) - x,
}
"""Estimate at each token from log reference - log pi."""


def reference_kl(estimator: KlEstimator, logprobs_C: Tensor, reference_logprobs_C: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate KL(pi || reference) at each token.

    Args:
        estimator: formula.
        logprobs_C: log pi; the estimate is differentiable with respect to it.
        reference_logprobs_C: constants.

    Returns:
        (float64 [C] in nats, bool [C]: log-ratios that were bounded to +-20, and so are constants for the gradient).
    """
    log_ratio_C = ops.log_ratio(reference_logprobs_C.detach().double(), logprobs_C.double())
    bounded_C = log_ratio_C.detach().abs() > ops.LOG_RATIO_BOUND
    return _ESTIMATORS[estimator](log_ratio_C.clamp(-ops.LOG_RATIO_BOUND, ops.LOG_RATIO_BOUND)), bounded_C


def regularisation(algorithm: Algorithm, inputs: LossInputs, share_C: Tensor) -> Regularisation:
    """Return the terms of one micro-batch.

    Args:
        algorithm: coefficients, and estimator of the KL divergence.
        inputs: with reference logprobs for a KL penalty in the loss, and with entropies for a bonus.
        share_C: float64, factor of each token's loss in the loss of the batch; 0 for tokens outside the denominator.

    Raises:
        ValueError: a term is wanted, and its input is missing.
    """
    kl_loss = entropy_bonus = share_C.new_zeros(())
    bounded_C = torch.zeros_like(share_C, dtype=torch.bool)
    if algorithm.has_kl_loss:
        estimate_C, bounded_C = reference_kl(algorithm.kl.estimator, inputs.current_logprobs_C, _reference(inputs))
        kl_loss = algorithm.kl.coefficient * (estimate_C * share_C).sum()
    if algorithm.entropy_coefficient > 0:
        if inputs.current_entropies_C is None:
            raise ValueError("algorithm.entropy_coefficient needs the entropies of the current policy.")
        entropy_bonus = algorithm.entropy_coefficient * (inputs.current_entropies_C.double() * share_C).sum()
    return Regularisation(kl_loss=kl_loss, entropy_bonus=entropy_bonus, bounded_C=bounded_C)


def sequence_penalties(algorithm: Algorithm, tokens: TokenTensors) -> Tensor:
    """Return what the KL penalty subtracts from the reward of each sequence, float64 [S].

    It is the coefficient times the sum of the estimates at the sequence's tokens, before the first update.

    Raises:
        ValueError: proximal or reference logprobs are missing.
    """
    if tokens.proximal_logprobs_C is None:
        raise ValueError("a KL penalty in the reward needs proximal_logprobs; measure the packs first.")
    estimate_C, _ = reference_kl(algorithm.kl.estimator, tokens.proximal_logprobs_C, _reference(tokens))
    sums_S = ops.segment_sum(estimate_C, tokens.sequence_index_C, tokens.num_sequences)
    return algorithm.kl.coefficient * sums_S


def _reference(tokens: TokenTensors) -> Tensor:
    if tokens.reference_logprobs_C is None:
        raise ValueError("algorithm.kl needs reference_logprobs; score the packs with the reference policy first.")
    return tokens.reference_logprobs_C
