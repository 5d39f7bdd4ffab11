"""Broadcast of weights from rank 0 to the engines, which form a weight group: layout, and interfaces of both ends.

Each engine's package names its sender and receiver in `EngineKind`; `GroupSender` and `GroupReceiver` work for every
engine that loads tensors in its own process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from betterhalf.distributed.broadcast import BroadcastGroup
from betterhalf.distributed.group import Membership
from betterhalf.errors import WeightSyncError
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.wire import WeightStream


@dataclass(frozen=True, slots=True, kw_only=True)
class WireWeight:
    """One weight of a sync, without its values."""

    name: str
    """Unfused Hugging Face name."""
    dtype: torch.dtype
    """Wire dtype."""
    shape: tuple[int, ...]


Layout = Sequence[WireWeight]
"""All weights of a sync, in the order in which they are sent."""


def layout_of(weights: Iterable[tuple[str, Tensor]]) -> tuple[WireWeight, ...]:
    """Read all weights, and return their layout."""
    return tuple(WireWeight(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in weights)


class WeightSender(Protocol):
    """Sending end of a weight group, on rank 0."""

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Broadcast the weights, which must be those of the layout, in its order.

        Raises:
            WeightSyncError: they differ from the layout.
            RuntimeError: a member has ended, or this member left the group meanwhile.
        """
        ...

    def leave(self) -> None:
        """Leave the group; safe to call twice, and while another thread sends."""
        ...


class WeightReceiver(Protocol):
    """Receiving end of a weight group, in the process of one engine."""

    def prepare(self, layout: Layout) -> None:
        """Start what the engine needs to receive, and check names and shapes before anything is sent.

        Raises:
            EngineError: a name is unknown, missing or repeated, or a shape is wrong.
        """
        ...

    def join(self, membership: Membership) -> None:
        """Join the group with one rank for each worker of the engine, the first of them `membership.rank`.

        Raises:
            RunError, RuntimeError: a member did not join in time, or this member left the group meanwhile.
        """
        ...

    def receive(self, layout: Layout, *, policy_version: int) -> None:
        """Receive and load all weights, as `RolloutEngine.load_weights` does.

        Raises:
            RunError, RuntimeError: a member has ended, or this member left the group meanwhile. The engine then holds
                no weights and is outside the group, but can load others.
        """
        ...

    def leave(self) -> None:
        """Leave the group between two syncs; does nothing outside of a group."""
        ...

    def give_up(self) -> None:
        """Leave the group while another thread joins or receives."""
        ...


@runtime_checkable
class HandleReceiver(Protocol):
    """Engine that loads weights from handles of GPU memory; see `rollout.handles`.

    After an error the engine holds no weights, but can load others.
    """

    def begin_update(self) -> None:
        """Begin an update, whose parts arrive through `update`."""
        ...

    def update(self, info: dict[str, Any]) -> None:
        """Load one part; its memory stays valid until this returns."""
        ...

    def finish_update(self, wire_dtype: torch.dtype, *, policy_version: int) -> None:
        """End an update in which every weight has arrived."""
        ...

    def abandon_update(self) -> None:
        """Discard an update in progress; the engine then holds no weights, but can load others."""
        ...


class Delivery(Protocol):
    """Path that sends weights to several engines at the same time, in place of `EngineHandle.load_weights`."""

    @property
    def path(self) -> str:
        """Path that the last weights took, in words, for the contract."""
        ...

    def deliver(self, weights: WeightStream, engines: Sequence[int]) -> Mapping[int, dict[str, str]]:
        """Send weights to engines, by their indices.

        Returns:
            Index -> digests of the weights that the engine holds, for each engine that received all of them; the caller
            compares the digests. Any other engine holds no weights, and has to load them.

        Raises:
            TrainerDiedError: a rank ended.
        """
        ...


def require_layout(layout: Layout, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as they come, after a check that they are those of the layout.

    Raises:
        WeightSyncError: a weight differs in name, dtype or shape, is missing, or is not in the layout; the message
            names the first one.
    """
    wanted = iter(layout)
    for name, tensor in weights:
        one = next(wanted, None)
        if one != WireWeight(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)):
            raise WeightSyncError(f"weight {name!r} was sent where the engines expect {one}; report this")
        yield name, tensor
    missing = next(wanted, None)
    if missing is not None:
        raise WeightSyncError(f"weight {missing.name!r} was not sent; report this")


class GroupSender:
    """Sender on rank 0 that broadcasts one tensor at a time; implements `WeightSender`."""

    def __init__(self, membership: Membership, device: torch.device, layout: Layout) -> None:
        """Join the group as rank 0; see `BroadcastGroup`."""
        self._group, self._device, self._layout = BroadcastGroup(membership, device), device, layout

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `WeightSender.send`."""
        for _, tensor in require_layout(self._layout, weights):
            self._group.broadcast(tensor.detach().to(self._device).contiguous())

    def leave(self) -> None:
        """See `WeightSender.leave`."""
        self._group.leave()


class GroupReceiver:
    """Receiver for an engine that computes in this process; implements `WeightReceiver`."""

    def __init__(self, engine: RolloutEngine, device: torch.device) -> None:
        """Receive on `device`, on which the engine accepts tensors."""
        self._engine, self._device = engine, device
        self._group: BroadcastGroup | None = None

    def prepare(self, layout: Layout) -> None:
        """Do nothing: the engine checks each weight as it arrives."""

    def join(self, membership: Membership) -> None:
        """See `WeightReceiver.join`."""
        self._group = BroadcastGroup(membership, self._device)

    def receive(self, layout: Layout, *, policy_version: int) -> None:
        """See `WeightReceiver.receive`."""
        assert self._group is not None, "receive before join"
        try:
            self._engine.load_weights(self._arriving(self._group, layout), policy_version=policy_version)
        except BaseException:
            self.leave()
            raise

    def _arriving(self, group: BroadcastGroup, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        for one in layout:
            tensor = torch.empty(one.shape, dtype=one.dtype, device=self._device)
            group.broadcast(tensor)
            yield one.name, tensor

    def leave(self) -> None:
        """See `WeightReceiver.leave`."""
        group, self._group = self._group, None
        if group is not None:
            group.leave()

    def give_up(self) -> None:
        """See `WeightReceiver.give_up`."""
        group = self._group
        if group is not None:
            group.leave()
