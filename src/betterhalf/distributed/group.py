"""The ranks of a trainer in processes of their own, as a `Collective` over torch.distributed.

NCCL moves tensors between GPUs, gloo between CPUs. All ranks connect through a TCP store on rank 0; neither `torchrun`
nor environment variables are needed.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from betterhalf.errors import TrainerDiedError

_ELSEWHERE = ("10.255.255.255", 1)
"""Some address on another host. Connecting a UDP socket to it sends nothing, and tells which local address is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Rank of one process in a group, and the address through which the group connects."""

    rank: int
    """From 0 to `world_size` - 1."""
    world_size: int
    host: str
    """Address of rank 0."""
    port: int
    """Port of the TCP store, chosen by rank 0."""
    seconds: float
    """Time limit of joining, and of each collective operation, in seconds."""


def free_address() -> tuple[str, int]:
    """Return the address at which other hosts reach this one, and a port on it that is free now."""
    host = _own_address()
    with socket.socket() as listener:
        listener.bind((host, 0))
        return host, listener.getsockname()[1]


def _own_address() -> str:
    """Return the address of the interface with a route to other hosts; the loopback address if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def join(membership: Membership, device: torch.device) -> GroupCollective:
    """Join the ranks, and wait until all have joined.

    Args:
        membership: rank of this process, and size and address of the group.
        device: device that computes; a GPU becomes the process's current one.

    Raises:
        TrainerDiedError: a rank did not join in time.
    """
    limit = timedelta(seconds=membership.seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            membership.host, membership.port, membership.world_size, is_master=membership.rank == 0, timeout=limit
        )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=membership.rank,
            world_size=membership.world_size,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
        ranks = GroupCollective(membership, device)
        # NCCL connects at the first collective. Running one here reports a missing rank as one that did not join.
        ranks.sum_(torch.zeros(1, dtype=torch.float64))
    except RuntimeError as error:
        raise TrainerDiedError(
            f"rank {membership.rank} of {membership.world_size} could not join the others through "
            f"{membership.host}:{membership.port} within {membership.seconds:g} s ({error}); look for a rank that "
            "ended, and check that the hosts of the ranks reach each other"
        ) from error
    return ranks


class GroupCollective:
    """All ranks of one trainer; implements `Collective`.

    A sum is an all-gather followed by an addition in rank order on every rank, because the order of additions in an
    all-reduce depends on the backend. The vectors are short.
    """

    def __init__(self, membership: Membership, device: torch.device) -> None:
        """Use the process group that this process has joined.

        Args:
            membership: rank of this process, and size of the group.
            device: device of the tensors that the backend moves.
        """
        self.membership = membership
        self.device = device

    @property
    def rank(self) -> int:
        """See `Collective.rank`."""
        return self.membership.rank

    @property
    def world_size(self) -> int:
        """See `Collective.world_size`."""
        return self.membership.world_size

    def max_(self, values: Tensor) -> None:
        """See `Collective.max_`."""
        values.copy_(torch.stack(self._all(values)).amax(0))

    def sum_(self, values: Tensor) -> None:
        """See `Collective.sum_`."""
        first, *others = self._all(values)
        for other in others:
            first += other
        values.copy_(first)

    def gather(self, values: Tensor) -> tuple[Tensor, ...]:
        """See `Collective.gather`; lengths are exchanged first."""
        lengths = [int(length) for length in self._all(torch.tensor([values.numel()]))]
        padded = values.new_zeros(max(lengths))
        padded[: values.numel()] = values
        return tuple(part[:length] for part, length in zip(self._all(padded), lengths, strict=True))

    def _all(self, values: Tensor) -> list[Tensor]:
        """All-gather `values`, of the same length on every rank; return copies on their device, in rank order."""
        mine = values.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.membership.world_size)]
        if mine.numel():
            dist.all_gather(parts, mine)
        return [part.to(values.device) for part in parts]

    def leave(self) -> None:
        """Destroy the process group, even if another rank has ended; safe to call twice."""
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
