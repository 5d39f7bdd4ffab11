"""Transfer of weights from a rank to the engines that bypasses the object store: broadcast, or handles of GPU memory.

Reading the weights is collective, so every rank reads all of them to the end, even if sending fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from betterhalf.cluster.weight_versions import Sent, StoredPart, storing
from betterhalf.config.schema import RunConfig
from betterhalf.distributed.group import Membership
from betterhalf.precision.contract import NotedWeights
from betterhalf.rollout.build import open_sender
from betterhalf.rollout.handles import handles_of, parts_of
from betterhalf.rollout.weight_group import WeightSender, WireWeight, layout_of
from betterhalf.training.policy_trainer import PolicyTrainer


class Outbox:
    """Sender of one rank's weights. Methods marked collective are called on all ranks at the same time."""

    def __init__(self, trainer: PolicyTrainer, config: RunConfig) -> None:
        """Send the weights of `trainer`."""
        self._trainer, self._config = trainer, config
        self._layout: tuple[WireWeight, ...] = ()
        self._sender: WeightSender | None = None
        self._noted: NotedWeights | None = None
        self._left: Iterator[list[tuple[str, Tensor]]] = iter(())
        """Parts that an update by handles has not sent yet."""
        self._shown: list[tuple[str, Tensor]] = []
        """Part whose handles engines may be reading."""

    @property
    def _device(self) -> torch.device:
        return self._trainer.precision.device

    def _stream(self) -> NotedWeights:
        return self._trainer.outgoing.stream(self._trainer.precision.roles, self._trainer.policy_version)

    def layout(self) -> tuple[WireWeight, ...]:
        """Return names, dtypes and shapes of all weights, found by reading them once; collective."""
        if not self._layout:
            self._layout = layout_of(self._trainer.outgoing.on_the_wire(self._trainer.precision.roles.wire_dtype))
        return self._layout

    # -- a broadcast

    def join(self, membership: Membership) -> None:
        """Join the engines as rank 0 of their group, after `layout`.

        Raises:
            RunError, RuntimeError: an engine did not join in time.
        """
        self.leave()
        self._sender = open_sender(self._config, membership, self._device, self._layout)

    def send(self, *, first: bool, keep: bool) -> Sent:
        """Send all weights to the group; collective.

        Args:
            first: True on rank 0, which sends.
            keep: store the weights as well.

        Returns:
            On rank 0, the digests, and `failure` if the group failed; elsewhere, no digests. An error of this rank
            while it reads the weights is raised.
        """
        parts: list[StoredPart] = []
        noted = self._stream()
        kept = storing(noted, self._trainer.precision.roles.rollout_dtype, parts) if keep and first else noted
        reading = _Reading(kept)
        failure = self._broadcast(reading) if first else None
        for _ in reading:
            pass
        if not first:
            return Sent(policy_version=noted.policy_version, digests={})
        return Sent(
            policy_version=noted.policy_version,
            digests=noted.digests(),
            parts=tuple(parts),
            failure=failure,
        )

    def _broadcast(self, weights: _Reading) -> str | None:
        if self._sender is None:
            return "rank 0 is not in the weight group"
        try:
            self._sender.send(self._here(weights))
        except Exception as error:
            if weights.failed:
                raise
            return f"{type(error).__name__}: {error}"
        return None

    def _here(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights on this rank's device; offloaded masters are copied from host memory."""
        return ((name, tensor.to(self._device)) for name, tensor in weights)

    def leave(self) -> None:
        """Leave the group, even while another thread sends; does nothing outside of a group."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.leave()

    # -- handles

    def next_handles(self, *, shown: bool) -> dict[str, Any] | None:
        """Return an update info with handles of the next weights on this GPU, and free the previous ones; collective.

        Args:
            shown: True for a rank whose GPU an engine shares; others return an empty update info.

        Returns:
            None after the last part.
        """
        if self._noted is None:
            self._noted = self._stream()
            self._left = parts_of(self._here(self._noted))
        self._shown = next(self._left, [])
        if not self._shown:
            return None
        if not shown:
            return {}
        info = handles_of(self._shown, self._device)
        # Other processes read on streams of their own.
        torch.cuda.current_stream(self._device).synchronize()
        return info

    def end_handles(self) -> Sent:
        """End an update by handles: read the remaining weights, and free the last part; collective."""
        noted, self._noted = self._noted or self._stream(), None
        for _ in self._left:
            pass
        self._left, self._shown = iter(()), []
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        return Sent(policy_version=noted.policy_version, digests=noted.digests())


class _Reading:
    """Iterator over weights that several readers share; `failed` is True once reading a weight has raised an error."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = iter(weights)
        self.failed = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        try:
            return next(self._weights)
        except Exception as error:
            self.failed = not isinstance(error, StopIteration)
            raise
