"""The Protocol of a trainer, which computes the policy pi, and the records that it exchanges with the loop.

`PolicyTrainer` implements it in this process. Packs and results are in host memory, except for `LossStats`, whose sums
stay on the trainer's device until they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import Denominators, MicroBatch
from betterhalf.precision.contract import SideReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Trainer logprobs of the C completion tokens of one pack, and the entropies of their distributions."""

    logprobs_C: Tensor
    """float32 [C], host: log pi of each completion token, in nats."""
    entropies_C: Tensor
    """float32 [C], host, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimReport:
    """Result of one optimizer step."""

    skipped: bool
    """True if gradients were not finite: weights and policy version are unchanged."""
    first_offender: str | None
    """First parameter with a non-finite gradient; None when the step was applied."""
    grad_norm: float
    """Norm of the unscaled gradient over all ranks before clipping; NaN when skipped."""
    subnormal_fraction: float
    """Share, over all ranks, of non-zero scaled gradient entries below the compute format's smallest normal number."""
    zero_fraction: float
    """Share, over all ranks, of gradient entries that are zero, by underflow or in exact arithmetic."""
    overflow_fraction: float
    """Share, over all ranks, of gradient entries that are not finite."""
    loss_scale: float
    """Loss scale of the next loss: the scaler has been updated after this step."""
    policy_version: int
    """Number of applied updates, this one included unless it was skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireWeights:
    """Weights for an engine, and their policy version."""

    policy_version: int
    """Number of applied updates in these weights."""
    tensors: Iterator[tuple[str, Tensor]]
    """(unfused Hugging Face name, master rounded once to the wire dtype), one tensor at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Everything a trainer needs to continue bit for bit."""

    model: dict[str, Tensor]
    """FP32 masters by unfused Hugging Face name."""
    optimizer: dict[str, Tensor]
    """AdamW states by `<state>/<name>`."""
    loss_scaler: dict[str, float]
    """Scale and counters; see `LossScaler.state_dict`."""
    policy_version: int
    """Number of applied updates."""
    reference: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the reference policy in the compute dtype, by name; empty if it is the starting policy, or if there is
    none."""
    reference_digest: str = ""
    """Checksum of the reference policy; empty without one."""
    source: str = "the trainer's state"
    """Name of its origin, for messages."""


class Trainer(Protocol):
    """Holder of the policy pi, which scores tokens, accumulates gradients and takes optimizer steps."""

    def measure(self, packs: Sequence[MicroBatch], temperature: float | None = None) -> list[TokenScores]:
        """Score the completion tokens of each pack at the current weights.

        Args:
            packs: any number; each is one forward pass.
            temperature: divides the logits; by default, the run's sampling temperature.

        Returns:
            One record for each pack. The logprobs equal those that `forward_backward` computes, bit for bit.
        """
        ...

    def measure_reference(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """Score the completion tokens of each pack with the reference policy, at the run's sampling temperature.

        The passes are those of `measure`: while the policy is its own reference, the logprobs are equal bit for bit.
        The trainer must have been built with a reference policy.
        """
        ...

    def refresh_reference(self) -> None:
        """Make the current policy the reference policy."""
        ...

    def forward_backward(
        self, packs: Sequence[MicroBatch], algorithm: Algorithm, denominators: Denominators
    ) -> LossStats:
        """Add the gradient of each pack to the sum for the next optimizer step.

        Args:
            packs: with proximal logprobs if `algorithm.needs_proximal`, and with reference logprobs if
                `algorithm.has_kl_loss`; may be empty.
            algorithm: the loss.
            denominators: those of the whole train batch.

        Returns:
            Loss and counts, summed over the packs.
        """
        ...

    def optim_step(self, learning_rate: float) -> OptimReport:
        """Unscale and clip the gradients, then update the weights, or skip the step if a gradient is not finite.

        Raises:
            LossScaleError: too many skipped steps in a row with the loss scale at its floor.
        """
        ...

    def wire_weights(self) -> WireWeights:
        """Return the current weights in the wire dtype, as a stream that is read once."""
        ...

    def report(self) -> SideReport:
        """Report the formats, facts and weight digests of the trainer as it runs.

        Raises:
            NumericsError: the forward pass gives NaN or infinity.
        """
        ...

    def state(self) -> TrainerState:
        """Return the state; its tensors share memory with the trainer."""
        ...

    def load(self, state: TrainerState) -> None:
        """Continue from `state()` of a trainer of the same model; gradients accumulated so far are discarded.

        Raises:
            CheckpointError: the state is of another model, of another kind of loss scaler, or of a run with another
                reference policy.
        """
        ...

    def close(self) -> None:
        """Release memory and processes; calling it twice is harmless."""
        ...
