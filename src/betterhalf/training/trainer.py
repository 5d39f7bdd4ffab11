"""The Protocol of a trainer, which computes the policy pi, and the records that it exchanges with the loop.

`PolicyTrainer` implements it in this process. Packs and results are in host memory, except for `LossStats`, whose sums
stay on the trainer's device until they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import Denominators, MicroBatch
from betterhalf.precision.contract import SideReport
from betterhalf.precision.merge import MergeCount
from betterhalf.training.shards import ShardFile
from betterhalf.wire import WeightStream


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Trainer logprobs of the C completion tokens of one pack, and the entropies of their distributions."""

    logprobs_C: Tensor
    """float32 [C], host: log pi of each completion token, in nats."""
    entropies_C: Tensor
    """float32 [C], host, in nats."""
    experts_TLK: Tensor | None = None
    """uint8 or int16 [T, L, K], host: experts that the trainer's own routers choose for each token of the pack, even
    if it computes with the engine's choices; None without experts."""
    num_experts: int = 0
    """Number of experts in a layer; 0 without experts."""

    def on_host(self) -> TokenScores:
        """Return the scores in host memory."""
        return replace(self, logprobs_C=self.logprobs_C.cpu(), entropies_C=self.entropies_C.cpu())


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
class TrainerState:
    """Everything a trainer needs to continue bit for bit."""

    model: dict[str, Tensor]
    """FP32 masters by parameter name in the transformers module."""
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
    base_digest: str = ""
    """Checksum of the frozen base of LoRA adapters; empty without adapters."""
    source: str = "the trainer's state"
    """Name of its origin, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenState:
    """State of a trainer without its tensors, which are in files: the numbers of `TrainerState`."""

    loss_scaler: dict[str, float]
    policy_version: int
    reference_digest: str
    base_digest: str = ""


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

    def keep_version(self) -> None:
        """Keep a copy of the computing weights for `measure_kept`; it replaces the previous copy."""
        ...

    def measure_kept(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """Score the completion tokens of each pack at the weights of the last `keep_version`.

        The passes are those of `measure`, at the run's sampling temperature: the logprobs are those that `measure` gave
        then, bit for bit.
        """
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

    def weight_stream(self) -> WeightStream:
        """Return the current weights, rounded once to the wire dtype, with the digest of each in the rollout dtype."""
        ...

    def merge_count(self) -> MergeCount | None:
        """Return the counts of the last weight stream that was read to its end; None if it merged no adapters."""
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
            CheckpointError: the state is of another model, of adapters of another base, of another kind of loss scaler,
                or of a run with another reference policy.
        """
        ...

    def write_state(self, folder: Path) -> WrittenState:
        """Write every tensor of the state below `folder`, each rank its own shards, and return what describes them.

        The tensors are copied to host memory before this returns; the files are written in the background and
        complete once `wait_written` returns.

        Raises:
            RunError: an earlier write failed, for example on a full disk.
        """
        ...

    def wait_written(self) -> tuple[ShardFile, ...]:
        """Wait for the files of the last `write_state`, and return those of all ranks, in rank order.

        It is called from another thread than the other methods, which may run meanwhile. When it returns or raises, no
        rank writes any more.

        Raises:
            RunError: a file cannot be written.
        """
        ...

    def read_state(self, folder: Path, written: WrittenState, source: str) -> None:
        """Continue from the files of a trainer with any number of ranks; each rank reads its own rows.

        Raises:
            CheckpointError: as `load`, or a file cannot be read.
        """
        ...

    def restart(self) -> None:
        """Replace the processes of the trainer after a `TrainerDiedError` by new ones, with the model's own weights.

        Raises:
            RunError: the trainer has no process of its own.
            TrainerDiedError: they cannot be started.
        """
        ...

    def close(self) -> None:
        """Release memory and processes; calling it twice is harmless."""
        ...
