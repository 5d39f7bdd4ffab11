"""The records of the packs that one training step learns from, and the inputs of its loss.

No torch at run time: tensors are named in annotations only. `types` explains the axis letters.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from betterhalf.token_support import PackedSupport


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSegment:
    """Contiguous tokens of a pack: a whole sequence, a prompt that siblings share, or a sibling's completion."""

    length: int
    """Number of its own tokens; at least one."""
    prefix: int | None = None
    """Index of the earlier segment with the prompt of a completion, which attends to all of it; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTensors:
    """Constants in the loss of S sequences with C completion tokens in total.

    `MicroBatch` carries them and `LossInputs` hands them to the loss, so a new one is a field here and nowhere else.
    """

    sequence_index_C: Tensor
    """int64 [C]: index of the sequence to which each completion token belongs; a sequence may have no token."""
    behavior_logprobs_C: Tensor
    """float32 [C]: log mu, from the engine."""
    advantages_S: Tensor
    """float32 [S]: advantage of each sequence, shared by its tokens."""
    proximal_logprobs_C: Tensor | None = None
    """float32 [C]: the trainer's logprobs before the first update on the batch; None if nothing reads them."""
    behavior_top_logprobs_CK: Tensor | None = None
    """float32 [C, K]: log mu of the engine's most likely tokens; None without `algorithm.score_centering`."""
    reference_logprobs_C: Tensor | None = None
    """float32 [C]: log-probability under the reference policy; None if nothing reads it."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences, S."""
        return int(self.advantages_S.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs(TokenTensors):
    """Inputs of the loss of one micro-batch: the constants, and the logprobs of the policy being trained."""

    current_logprobs_C: Tensor
    """float32 [C]: log pi of the weights being trained, with a graph."""
    current_top_logprobs_CK: Tensor | None = None
    """float32 [C, K]: log pi of the engine's most likely tokens, with a graph; None without
    `algorithm.score_centering`."""
    current_entropies_C: Tensor | None = None
    """float32 [C]: entropy of pi where each token was sampled, with a graph; None without an entropy bonus."""

    @classmethod
    def of(cls, tokens: TokenTensors, current_logprobs_C: Tensor, **more: Tensor | None) -> LossInputs:
        """Add the current logprobs, and other fields of this class, to the constants of the same tokens."""
        constants = {each.name: getattr(tokens, each.name) for each in fields(TokenTensors)}
        values: dict[str, Any] = {**constants, **more}
        return cls(current_logprobs_C=current_logprobs_C, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch(TokenTensors):
    """Sequences concatenated without padding, for one forward (and backward) pass.

    Packing leaves the tensors in host memory; the trainer moves them to its device. Siblings share one copy of their
    prompt, and tokens after which nothing is predicted are left out. Each of the C completion tokens of all S sequences
    has a loss; `loss_rows_C[i]` is the position whose logits predict `target_ids_C[i]`.
    """

    token_ids_T: Tensor
    """int64 [T]: the tokens of each segment in turn."""
    position_ids_T: Tensor
    """int64 [T]: position within the sequence, from 0; a completion continues the positions of its prompt."""
    segments: tuple[PackedSegment, ...]
    """Attention structure: each segment attends causally to itself and to all of its prefix; the lengths sum to T."""
    loss_rows_C: Tensor
    """int64 [C]: row in T of the token before each completion token; siblings share the last row of their prompt."""
    target_ids_C: Tensor
    """int64 [C]: the completion tokens."""
    top_ids_CK: Tensor | None = None
    """int64 [C, K]: the engine's most likely tokens at each position; None without `algorithm.score_centering`."""
    rollout_index_S: tuple[int, ...]
    """[S]: position of each sequence among the step's rollouts (groups in order, siblings in order), followed by those
    that are left out of the step."""
    experts_TLK: Tensor | None = None
    """uint8 or int16 [T, L, K]: the engine's experts of each token in each layer that has any; None if it did not
    report them. Siblings share those of their prompt."""
    support: PackedSupport | None = None
    """Sets to which sampling was truncated; None if it drew from the whole vocabulary."""

    @property
    def num_tokens(self) -> int:
        """Number of packed tokens, T."""
        return int(self.token_ids_T.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Divisors of the loss of one optimizer step, fixed before its first micro-batch: masks do not change them."""

    sequences: float
    """Number of sequences in the train batch, those with zero advantage included."""
    tokens: float
    """Number of their completion tokens."""
    max_tokens: int
    """Length limit of a completion: the constant of `constant_length`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Packs of one optimizer step, identified by their index in `StepBatch.packs`."""

    micro_batches: tuple[int, ...]
    """Packs that are trained on: sequences with a non-zero advantage, or all of them if packed with `train_all`; may be
    empty."""
    measure_only: tuple[int, ...]
    """Packs of zero-advantage sequences: no gradient, but they count in the mismatch and in the denominators."""
    denominators: Denominators
    masked: tuple[int, ...] = ()
    """Packs of completions that `algorithm.mask_truncated` leaves without a loss: measured only."""

    @property
    def countable(self) -> tuple[int, ...]:
        """Packs that the denominators may count, trained ones first."""
        return self.micro_batches + self.measure_only

    @property
    def packs(self) -> tuple[int, ...]:
        """Every pack, trained ones first."""
        return self.countable + self.masked


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """Packs of one step, in host memory."""

    packs: tuple[MicroBatch, ...]
    """Every pack of the step: those of the train batches in order, then those left out."""
    train_batches: tuple[TrainBatch, ...]
    """Train batches, in the order in which they are trained on."""
    left_out: tuple[int, ...] = ()
    """Packs of sequences that belong to no train batch: they count in the mismatch and in nothing else."""

    @property
    def masked_sequences(self) -> int:
        """Number of sequences without a loss because of `algorithm.mask_truncated`."""
        return sum(self.packs[index].num_sequences for one in self.train_batches for index in one.masked)

    def chosen(self, indices: Iterable[int]) -> list[MicroBatch]:
        """Return the packs with these indices."""
        return [self.packs[index] for index in indices]
