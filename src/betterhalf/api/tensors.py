"""Measurements and losses for other trainers, on their padded tensors as well as on packed ones.

Each function takes [batch, length] tensors with `mask`, or [tokens] tensors with `sequence_index`, and gives what the
package itself computes from the packed form. `betterhalf.padded` describes the two forms.

Axes: B rows of padded tensors, L their length, C completion tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.algorithms import policy_loss as packed_loss
from betterhalf.algorithms.denominators import train_denominators
from betterhalf.algorithms.policy_loss import LossOutput
from betterhalf.algorithms.presets import Algorithm, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs
from betterhalf.config.load import configuration_of
from betterhalf.config.schema import AlgorithmConfig
from betterhalf.diagnostics import budget, logprob_gap
from betterhalf.diagnostics.budget import ESS_FLOOR, Budget
from betterhalf.diagnostics.logprob_gap import GapProfile
from betterhalf.errors import InputError
from betterhalf.padded import TokenLayout, token_layout, wide

AlgorithmLike = str | Mapping[str, Any] | AlgorithmConfig | Algorithm
"""Preset name, choices as in the section `[algorithm]` of an experiment, or a resolved algorithm."""


def mismatch_metrics(
    trainer_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    sequence_index: Tensor | None = None,
    num_sequences: int | None = None,
) -> dict[str, float]:
    """Return every `mismatch/` metric of a batch; docs/metrics.md documents them.

    Args:
        trainer_logprobs: [B, L] or [C], log pi of the sampled tokens at the weights that sampled them.
        behavior_logprobs: same shape, log mu as the engine returned it, of the distribution sampled from.
        mask: [B, L], bool or 0 and 1: true for completion tokens. What the tensors hold elsewhere is not read.
        sequence_index: integers [C], which sequence each token belongs to.
        num_sequences: number of sequences of a packed batch; by default one more than the largest index.

    Raises:
        InputError: shapes or dtypes do not fit, or there are no completion tokens.
        EngineNumericsError, NumericsError: logprobs of completion tokens are not finite.
    """
    layout = token_layout(trainer_logprobs, mask=mask, sequence_index=sequence_index, num_sequences=num_sequences)
    trainer_C, behavior_C = _both(layout, trainer_logprobs, behavior_logprobs)
    return logprob_gap.mismatch_metrics(trainer_C, behavior_C, layout.sequence_index_C, layout.num_sequences)


def mismatch_profile(
    trainer_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    sequence_index: Tensor | None = None,
    num_sequences: int | None = None,
) -> GapProfile:
    """Return the mismatch by probability, by position and by completion; arguments and errors of `mismatch_metrics`.

    `completions` has the length and the summed log-ratio of each sequence with tokens. Positions count the completion
    tokens of a sequence, without holes.

    Raises:
        InputError: also if the tokens of a packed sequence are not contiguous.
    """
    layout = token_layout(trainer_logprobs, mask=mask, sequence_index=sequence_index, num_sequences=num_sequences)
    trainer_C, behavior_C = _both(layout, trainer_logprobs, behavior_logprobs)
    index_C = layout.sequence_index_C
    if int((index_C[1:] != index_C[:-1]).sum()) + 1 != int(torch.bincount(index_C).count_nonzero()):
        raise InputError("the tokens of a sequence are not contiguous; sort the tensors by sequence_index.")
    return logprob_gap.gap_profile(trainer_C, behavior_C, index_C, layout.num_sequences, layout.longest)


def fit_budget(
    trainer_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    sequence_index: Tensor | None = None,
    num_sequences: int | None = None,
    floor: float = ESS_FLOOR,
) -> Budget:
    """Fit the effective sample size that the mismatch leaves at a length; arguments and errors of `mismatch_metrics`.

    Args:
        trainer_logprobs, behavior_logprobs, mask, sequence_index, num_sequences: as in `mismatch_metrics`.
        floor: share of effective samples, between 0 and 1, that defines `Budget.max_length`.

    Raises:
        InputError: also if `floor` is not between 0 and 1.
    """
    if not 0 < floor < 1:
        raise InputError(f"floor={floor} is not a share of effective samples; choose one between 0 and 1.")
    layout = token_layout(trainer_logprobs, mask=mask, sequence_index=sequence_index, num_sequences=num_sequences)
    trainer_C, behavior_C = _both(layout, trainer_logprobs, behavior_logprobs)
    d_C = ops.log_ratio(trainer_C.double(), behavior_C.double())
    return budget.fit_budget(d_C, layout.sequence_index_C, layout.num_sequences, floor=floor)


def policy_loss(
    algorithm: AlgorithmLike,
    current_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    *,
    proximal_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_index: Tensor | None = None,
    num_sequences: int | None = None,
    max_tokens: int | None = None,
    denominators: Denominators | None = None,
) -> LossOutput:
    """Return the loss of a batch of completions, to be minimised, and its statistics.

    Args:
        algorithm: preset name such as `grpo_token_tis`, or choices: `{"preset": "grpo", "surrogate": {"upper": 1.2}}`.
        current_logprobs: [B, L] or [C], log pi of the weights being trained, with a graph.
        behavior_logprobs: same shape, log mu from the engine.
        advantages: [B], [B, 1], or [B, L] with one value in each row; packed: [S], or [C] constant in a sequence.
        proximal_logprobs: same shape as the logprobs, log pi before the first update on this batch. For that first
            update it is `current_logprobs.detach()`.
        reference_logprobs: same shape, for a KL penalty in the loss: log-probability under the reference policy.
        entropies: same shape, for an entropy bonus: entropy of pi where each token was sampled, with a graph.
        mask: [B, L], bool or 0 and 1: true for completion tokens.
        sequence_index: integers [C], which sequence each token belongs to.
        num_sequences: number of sequences of a packed batch; by default one more than the largest index.
        max_tokens: length limit of a completion, by which `constant_length` divides. By default the width of the
            padded tensors, or the longest packed sequence: right only if every batch has the same.
        denominators: those of the whole train batch if this is one micro-batch of several; by default of this batch.

    Returns:
        `loss`, a scalar with a graph in FP32, or in FP64 if the logprobs are, and `stats`, from which `policy_metrics`
        makes the metrics.

    Raises:
        InputError: shapes or dtypes do not fit, the algorithm needs logprobs or entropies that are missing, or it has
            a KL penalty in the reward.
        ConfigError: the algorithm is unknown, or its choices contradict each other.
    """
    chosen = _usable(resolved(algorithm))
    layout = token_layout(current_logprobs, mask=mask, sequence_index=sequence_index, num_sequences=num_sequences)
    current_C, behavior_C = _both(layout, current_logprobs, behavior_logprobs, name="current_logprobs")
    inputs = LossInputs(
        current_logprobs_C=current_C,
        behavior_logprobs_C=behavior_C,
        proximal_logprobs_C=_proximal(chosen, layout, proximal_logprobs),
        reference_logprobs_C=_reference(chosen, layout, reference_logprobs),
        current_entropies_C=_entropies(chosen, layout, entropies),
        advantages_S=layout.rows(advantages, "advantages").to(current_C.dtype),
        sequence_index_C=layout.sequence_index_C,
    )
    if denominators is not None and max_tokens is not None:
        raise InputError("denominators already hold max_tokens. Pass one of them.")
    limit = layout.longest if max_tokens is None else max_tokens
    divisors = denominators or _own_denominators(chosen, inputs, limit)
    return packed_loss.policy_loss(chosen, inputs, divisors)


def resolved(algorithm: AlgorithmLike) -> Algorithm:
    """Return the choices of an algorithm.

    Raises:
        ConfigError: the preset or a choice does not exist, or the choices contradict each other.
    """
    if isinstance(algorithm, Algorithm):
        return algorithm
    if isinstance(algorithm, AlgorithmConfig):
        return resolve_algorithm(algorithm)
    return resolve_algorithm(configuration_of(None, {"algorithm": algorithm}).algorithm)


def _usable(algorithm: Algorithm) -> Algorithm:
    """Refuse a choice that needs more than logprobs and advantages of the sampled tokens."""
    if algorithm.score_centering:
        raise InputError(
            "algorithm.score_centering needs the logprobs of the engine's most likely tokens, which this function does "
            "not take. Set it to 0, or train with `betterhalf train`."
        )
    if algorithm.reads_reference and not algorithm.has_kl_loss:
        raise InputError(
            "algorithm.kl.place=reward is a part of the rewards, and the loss gets advantages. Subtract the penalty "
            "from the rewards before you compute advantages and set algorithm.kl.coefficient=0, or set "
            "algorithm.kl.place=loss."
        )
    if algorithm.mask_truncated:
        raise InputError(
            "algorithm.mask_truncated needs to know which completions reached the length limit, and the loss gets "
            "their tokens only. Set it to false, and clear the mask of these completions."
        )
    return algorithm


def _both(
    layout: TokenLayout, trainer_logprobs: Tensor, behavior_logprobs: Tensor, *, name: str = "trainer_logprobs"
) -> tuple[Tensor, Tensor]:
    """Return both sides of the completion tokens, [C] in FP32 or wider.

    Raises:
        InputError: there are no completion tokens.
    """
    trainer_C, behavior_C = layout.take(trainer_logprobs, name), layout.take(behavior_logprobs, "behavior_logprobs")
    if trainer_C.numel() == 0:
        raise InputError("there are no completion tokens: the mask is empty. Pass those of at least one completion.")
    return wide(trainer_C, name), wide(behavior_C, "behavior_logprobs")


def _proximal(algorithm: Algorithm, layout: TokenLayout, proximal_logprobs: Tensor | None) -> Tensor | None:
    if proximal_logprobs is not None:
        return wide(layout.take(proximal_logprobs, "proximal_logprobs"), "proximal_logprobs")
    if algorithm.needs_proximal:
        raise InputError(
            f"{algorithm.preset} needs proximal_logprobs, the trainer's logprobs before the first update on the batch. "
            "For that first update, pass proximal_logprobs=current_logprobs.detach()."
        )
    return None


def _reference(algorithm: Algorithm, layout: TokenLayout, reference_logprobs: Tensor | None) -> Tensor | None:
    if reference_logprobs is not None:
        return wide(layout.take(reference_logprobs, "reference_logprobs"), "reference_logprobs")
    if algorithm.has_kl_loss:
        raise InputError(
            "algorithm.kl needs reference_logprobs, the logprobs of the same tokens under the reference policy. Pass "
            "them, or set algorithm.kl.coefficient=0."
        )
    return None


def _entropies(algorithm: Algorithm, layout: TokenLayout, entropies: Tensor | None) -> Tensor | None:
    if entropies is not None:
        return layout.take(entropies, "entropies")
    if algorithm.entropy_coefficient > 0:
        raise InputError(
            "algorithm.entropy_coefficient needs entropies, those of the policy at each token. Pass them, or set it "
            "to 0."
        )
    return None


def _own_denominators(algorithm: Algorithm, inputs: LossInputs, max_tokens: int) -> Denominators:
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens} is not a length. Pass the largest number of tokens of a completion.")
    counts = Denominators(
        sequences=float(inputs.num_sequences), tokens=float(inputs.current_logprobs_C.numel()), max_tokens=max_tokens
    )
    return train_denominators(algorithm, [inputs], counts)
