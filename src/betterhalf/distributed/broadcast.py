"""A group of processes of a run for broadcasts by one of them, beside the group of the trainer's ranks.

NCCL moves tensors between GPUs, gloo between CPUs. Members meet at a TCP store of rank 0.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from betterhalf.distributed.group import Membership


class BroadcastGroup:
    """Members of one group; rank 0 sends, all others receive."""

    def __init__(self, membership: Membership, device: torch.device) -> None:
        """Join, and wait until all members have joined.

        Args:
            membership: place of this process; its time limit holds for joining and for each broadcast.
            device: device of the tensors.

        Raises:
            RuntimeError: a member did not join in time.
        """
        limit = timedelta(seconds=membership.seconds)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            membership.host, membership.port, membership.world_size, is_master=membership.rank == 0, timeout=limit
        )
        self._group = _group_over(store, membership, device, limit)
        # NCCL connects at the first operation.
        self.broadcast(torch.zeros(1, device=device))

    def broadcast(self, tensor: Tensor) -> None:
        """Fill a contiguous `tensor` with that of rank 0.

        Raises:
            RuntimeError: a member has ended, the group was left, or the time limit has passed.
        """
        group = self._group
        if group is None:
            raise RuntimeError("the group was left")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        group.broadcast([tensor], options).wait()
        if tensor.is_cuda:
            # Waiting for NCCL only orders streams; the caller may change the tensor at once.
            torch.cuda.current_stream(tensor.device).synchronize()

    def leave(self) -> None:
        """Leave the group, also from another thread than one that broadcasts; harmless when repeated.

        NCCL gives up a broadcast in progress; gloo continues it until a member has ended or the time limit has passed.
        """
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


def _group_over(store: Any, membership: Membership, device: torch.device, limit: timedelta) -> Any:
    """Return torch's process group, which leaves the default one alone."""
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, membership.rank, membership.world_size, limit)
    options = dist.ProcessGroupNCCL.Options()
    # Past its own limit NCCL ends the whole process; the caller gives up before.
    options._timeout = 2 * limit
    return dist.ProcessGroupNCCL(store, membership.rank, membership.world_size, options)
