"""The ranks of a trainer in processes of their own, as a `Collective` over torch.distributed.

NCCL moves tensors between GPUs, gloo between CPUs. All ranks join through a TCP store of rank 0, without `torchrun` and
without environment variables.
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
"""Address that a datagram socket is pointed at, without sending, to learn the own address on the way there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Place of one process among the ranks."""

    rank: int
    """From 0 to `world_size` - 1."""
    world_size: int
    host: str
    """Address of rank 0."""
    port: int
    """Port of the TCP store on rank 0, which rank 0 has chosen."""
    seconds: float
    """Time limit of joining, and of each collective operation."""


def free_address() -> tuple[str, int]:
    """Return the address of this host towards the others, and a free port on it."""
    host = _own_address()
    with socket.socket() as listener:
        listener.bind((host, 0))
        return host, listener.getsockname()[1]


def _own_address() -> str:
    """Return the address of the interface that leads to other hosts; the loopback address without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def join(membership: Membership, device: torch.device) -> GroupCollective:
    """Join the ranks, and wait until all have joined.

    Args:
        membership: place of this process.
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
        # NCCL connects at the first collective: here, where a missing rank is known to be one that did not join.
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

    Sums are added in rank order on every rank: values are gathered and then added, because the order inside an
    all-reduce depends on the backend. The vectors have a few numbers.
    """

    def __init__(self, membership: Membership, device: torch.device) -> None:
        """Use the process group that this process has joined.

        Args:
            membership: place of this process.
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
        """Return copies of the `values` of every rank, all of one length, where those of this rank are."""
        mine = values.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.membership.world_size)]
        if mine.numel():
            dist.all_gather(parts, mine)
        return [part.to(values.device) for part in parts]

    def leave(self) -> None:
        """Leave the process group; harmless when a peer has ended."""
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
