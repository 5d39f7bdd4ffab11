"""The policy loss of one micro-batch: surrogate x correction x aggregation, with counts of everything that was cut off.

A KL penalty and an entropy bonus are terms of their own, aggregated in the same way (`algorithms.regularisation`).

The loss of a micro-batch is its additive share of the train batch's loss: it is divided by denominators fixed for the
whole batch, so the sum over micro-batches is the loss of the batch, however it was split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.algorithms.aggregation import token_shares
from betterhalf.algorithms.importance import Weights, importance_weights, leaves_trust_region
from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.own_loss import own_value
from betterhalf.algorithms.presets import Algorithm
from betterhalf.algorithms.regularisation import regularisation
from betterhalf.algorithms.score_centering import Centering, expected_score
from betterhalf.batches import Denominators, LossInputs, TokenTensors
from betterhalf.config.schema import RatioConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of one micro-batch, and its statistics."""

    loss: Tensor
    """FP32 scalar with a graph; a scalar, so that loss scaling happens in FP32."""
    stats: LossStats
    """Sums and maxima over the tokens, without a graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Logprobs and advantages of the C completion tokens, in FP32 or wider."""

    current_C: Tensor
    """With a graph."""
    proximal_C: Tensor
    behavior_C: Tensor
    advantages_C: Tensor
    """Advantage of each token's sequence."""
    index_C: Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surrogate:
    """The token losses before correction and aggregation."""

    loss_C: Tensor
    """[C], with a graph."""
    weights: Weights
    """Ratio of the surrogate, before and after its treatment."""
    clipped_C: Tensor
    """bool [C]: tokens whose gradient the clip removed."""


def policy_loss(algorithm: Algorithm, inputs: LossInputs, denominators: Denominators) -> LossOutput:
    """Return the loss of one micro-batch of whole sequences, to be minimised.

    Args:
        algorithm: the resolved choices.
        inputs: tensors of the micro-batch; with proximal logprobs when `algorithm.needs_proximal`, with reference
            logprobs when `algorithm.has_kl_loss`, with entropies for an entropy bonus, and with logprobs of the most
            likely tokens for Score Centering.
        denominators: those of the whole train batch.

    Returns:
        The loss, 0 (still with a graph) when there are no tokens, and its statistics.

    Raises:
        ValueError: the algorithm needs optional inputs and they are missing.
        RunError: the loss is the user's own, and it failed.
    """
    current_C = _at_least_fp32(inputs.current_logprobs_C)
    tokens = _Tokens(
        current_C=current_C,
        proximal_C=_proximal(algorithm, inputs.proximal_logprobs_C, current_C),
        behavior_C=_at_least_fp32(inputs.behavior_logprobs_C),
        advantages_C=inputs.advantages_S[inputs.sequence_index_C].to(current_C.dtype),
        index_C=inputs.sequence_index_C,
        num_sequences=inputs.num_sequences,
    )
    loss = _built_in_loss if algorithm.loss is None else _own_loss
    output = loss(algorithm, inputs, tokens, denominators)
    return _regularised(output, algorithm, inputs, tokens, denominators) if algorithm.trains_every_group else output


def _built_in_loss(algorithm: Algorithm, inputs: LossInputs, tokens: _Tokens, denominators: Denominators) -> LossOutput:
    """Return surrogate x correction x aggregation."""
    surrogate = _surrogate(algorithm.surrogate, tokens)
    centering = _centering(algorithm, inputs)
    if centering is not None:
        surrogate = replace(surrogate, loss_C=surrogate.loss_C + tokens.advantages_C * centering.expected_C)
    correction = _correction_weights(algorithm.correction, tokens)
    counted_C = _counted(algorithm, tokens)
    share_C = token_shares(algorithm.aggregation, counted_C, tokens.index_C, tokens.num_sequences, denominators)
    loss = (surrogate.loss_C * correction.weight_C.detach() * share_C.to(tokens.current_C.dtype)).sum()
    stats = _stats(loss, surrogate, correction, tokens, denominators.max_tokens)
    return LossOutput(loss=loss, stats=stats if centering is None else replace(stats, own=_of_centering(centering)))


def kept_mask(algorithm: Algorithm, tokens: TokenTensors) -> Tensor:
    """Return the tokens that no mask rejects before the first update, when the current policy is the proximal one.

    The result is bool [C]; all true for an algorithm without masks.

    Raises:
        ValueError: there are no proximal logprobs.
    """
    if tokens.proximal_logprobs_C is None:
        raise ValueError("the masks before the first update need proximal_logprobs; measure the packs first.")
    proximal_C = _at_least_fp32(tokens.proximal_logprobs_C).detach()
    unchanged = _Tokens(
        current_C=proximal_C,
        proximal_C=proximal_C,
        behavior_C=_at_least_fp32(tokens.behavior_logprobs_C),
        advantages_C=tokens.advantages_S[tokens.sequence_index_C],
        index_C=tokens.sequence_index_C,
        num_sequences=tokens.num_sequences,
    )
    return _kept(algorithm, unchanged)


def _centering(algorithm: Algorithm, inputs: LossInputs) -> Centering | None:
    """Return the expected score of each position; None without Score Centering."""
    if not algorithm.score_centering:
        return None
    if inputs.current_top_logprobs_CK is None or inputs.behavior_top_logprobs_CK is None:
        raise ValueError("algorithm.score_centering needs the logprobs of the engine's most likely tokens.")
    return expected_score(algorithm.surrogate, inputs.current_top_logprobs_CK, inputs.behavior_top_logprobs_CK)


def _of_centering(centering: Centering) -> dict[str, Tensor]:
    """Return the metrics of Score Centering, sums over tokens and their number; none without tokens."""
    tokens = centering.tail_C.numel()
    values = {"coefficients": centering.coefficients_C, "tail": centering.tail_C} if tokens else {}
    return {
        f"score_centering/{name}": torch.stack((value_C.sum(), value_C.new_tensor(float(tokens))))
        for name, value_C in values.items()
    }


def _at_least_fp32(logprobs: Tensor) -> Tensor:
    """Widen half logprobs to FP32; their ratios would measure the rounding of the logprobs."""
    return logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))


def _proximal(algorithm: Algorithm, proximal_logprobs_C: Tensor | None, current_C: Tensor) -> Tensor:
    """Return the anchor as a constant; the current logprobs if the algorithm does not read it."""
    if proximal_logprobs_C is not None:
        return _at_least_fp32(proximal_logprobs_C).detach()
    if algorithm.needs_proximal:
        raise ValueError(
            f"algorithm {algorithm.preset} needs proximal_logprobs; measure the packs before the first update."
        )
    return current_C.detach()


def _surrogate_weights(config: RatioConfig, tokens: _Tokens) -> Weights:
    """Return the surrogate's treated ratio, without the tokens that leave the trust region."""
    anchor_C = tokens.behavior_C if config.ratio == "current/behavior" else tokens.proximal_C
    weights = importance_weights(config, tokens.current_C, anchor_C, tokens.index_C, tokens.num_sequences)
    if config.probability_gap is None or config.level == "none":
        return weights
    inside_C = ~leaves_trust_region(config.probability_gap, tokens.current_C, tokens.behavior_C, tokens.advantages_C)
    return replace(weights, weight_C=weights.weight_C * inside_C, kept_C=weights.kept_C & inside_C)


def _correction_weights(config: RatioConfig, tokens: _Tokens) -> Weights:
    """Return the treated proximal/behavior ratio, a constant."""
    return importance_weights(config, tokens.proximal_C, tokens.behavior_C, tokens.index_C, tokens.num_sequences)


def _kept(algorithm: Algorithm, tokens: _Tokens) -> Tensor:
    """Return the tokens that neither mask drops, bool [C]."""
    surrogate = _surrogate_weights(algorithm.surrogate, tokens)
    return surrogate.kept_C & _correction_weights(algorithm.correction, tokens).kept_C


def _surrogate(config: RatioConfig, tokens: _Tokens) -> _Surrogate:
    """Compute -(weight x advantage), differentiated through the weight or through log pi."""
    weights = _surrogate_weights(config, tokens)
    clipped_C = torch.zeros_like(weights.kept_C)
    if config.level == "none" or config.gradient == "logprob":
        loss_C = -(weights.weight_C.detach() * tokens.advantages_C) * tokens.current_C
    elif config.treatment == "clip":
        loss_C, clipped_C = _clipped(config, weights.raw_C, tokens.advantages_C)
    else:
        loss_C = -weights.weight_C * tokens.advantages_C
    return _Surrogate(loss_C=loss_C, weights=weights, clipped_C=clipped_C)


def _clipped(config: RatioConfig, ratio_C: Tensor, advantages_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return PPO's pessimistic maximum of two losses, and where the clipped one, a constant, was chosen."""
    free_C = -ratio_C * advantages_C
    bounded_C = -ratio_C.clamp(config.lower, config.upper) * advantages_C
    loss_C, clipped_C = torch.maximum(free_C, bounded_C), bounded_C > free_C
    if config.dual_clip is None:
        return loss_C, clipped_C
    ceiling_C = -config.dual_clip * advantages_C
    over_C = (advantages_C < 0) & (loss_C > ceiling_C)
    return torch.where(over_C, ceiling_C, loss_C), clipped_C | over_C


def _counted(algorithm: Algorithm, tokens: _Tokens) -> Tensor:
    """Return the tokens in the denominator of their sequence's mean, bool [C], decided as if before any update."""
    if algorithm.denominator == "all":
        return torch.ones_like(tokens.index_C, dtype=torch.bool)
    return _kept(algorithm, replace(tokens, current_C=tokens.proximal_C))


def _drift(tokens: _Tokens) -> Tensor:
    """Return each token's ratio current/proximal, [C] without a graph, whatever ratio the surrogate has."""
    return _bounded_drift(tokens)[0]


def _bounded_drift(tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """Return that ratio, and where its logarithm was bounded, bool [C]."""
    return ops.bounded_exp(ops.log_ratio(tokens.current_C.detach(), tokens.proximal_C))


def _own_loss(algorithm: Algorithm, inputs: LossInputs, tokens: _Tokens, denominators: Denominators) -> LossOutput:
    """Return the loss of the user's own; its ratio is known, but not what it clips, masks or truncates."""
    assert algorithm.loss is not None
    value = own_value(algorithm.loss, inputs, denominators, algorithm)
    ratio_C, bounded_C = _bounded_drift(tokens)
    kept_C = torch.ones_like(bounded_C)
    stats = LossStats.count(
        loss=value.loss,
        ratio_C=ratio_C,
        negative_ratio_C=ratio_C * (tokens.advantages_C < 0),
        before_C=ratio_C,
        after_C=ratio_C,
        clipped_C=~kept_C,
        kept_C=kept_C,
        truncated_C=~kept_C,
        bounded_C=bounded_C,
        long_C=_long(tokens, denominators.max_tokens),
    )
    return LossOutput(loss=value.loss, stats=stats.of_own_loss(value.metrics))


def _regularised(
    output: LossOutput, algorithm: Algorithm, inputs: LossInputs, tokens: _Tokens, denominators: Denominators
) -> LossOutput:
    """Add the KL penalty and the entropy bonus, over the tokens that the denominators count."""
    counted_C = _counted(algorithm, tokens)
    share_C = token_shares(algorithm.aggregation, counted_C, tokens.index_C, tokens.num_sequences, denominators)
    terms = regularisation(algorithm, inputs, share_C * counted_C)
    loss = output.loss + (terms.kl_loss - terms.entropy_bonus).to(output.loss.dtype)
    return LossOutput(loss=loss, stats=output.stats.with_terms(loss, terms))


def _long(tokens: _Tokens, max_tokens: int) -> Tensor:
    """Return the tokens of completions longer than half the length limit, bool [C]."""
    lengths_S = ops.segment_sum(torch.ones_like(tokens.index_C), tokens.index_C, tokens.num_sequences)
    return (2 * lengths_S > max_tokens)[tokens.index_C]


def _stats(loss: Tensor, surrogate: _Surrogate, correction: Weights, tokens: _Tokens, max_tokens: int) -> LossStats:
    return LossStats.count(
        loss=loss,
        ratio_C=surrogate.weights.raw_C,
        negative_ratio_C=_drift(tokens) * (tokens.advantages_C < 0),
        before_C=surrogate.weights.raw_C * correction.raw_C,
        after_C=surrogate.weights.weight_C * ~surrogate.clipped_C * correction.weight_C,
        clipped_C=surrogate.clipped_C,
        kept_C=surrogate.weights.kept_C & correction.kept_C,
        truncated_C=surrogate.weights.truncated_C | correction.truncated_C,
        bounded_C=surrogate.weights.bounded_C | correction.bounded_C,
        long_C=_long(tokens, max_tokens),
    )
