"""Process group for broadcasts by rank 0, independent of the default group of the trainer's ranks.

NCCL moves tensors between GPUs, gloo between CPUs. Members connect through a TCP store on rank 0.
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
            membership: rank of this process, and size and address of the group; its time limit applies to joining and
                to each broadcast.
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
        """Broadcast rank 0's values into a contiguous `tensor`, in place; return when the transfer is complete.

        Raises:
            RuntimeError: a member has ended, this member has left the group, or the time limit has passed.
        """
        group = self._group
        if group is None:
            raise RuntimeError("this member has left the group")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        group.broadcast([tensor], options).wait()
        if tensor.is_cuda:
            # `wait` only orders CUDA streams; the caller may change the tensor as soon as this method returns.
            torch.cuda.current_stream(tensor.device).synchronize()

    def leave(self) -> None:
        """Leave the group; safe to call twice, and while another thread broadcasts.

        NCCL aborts a broadcast in progress; gloo continues it until a member has ended or the time limit has passed.
        """
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


def _group_over(store: Any, membership: Membership, device: torch.device, limit: timedelta) -> Any:
    """Return a torch process group that is independent of the default one."""
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, membership.rank, membership.world_size, limit)
    options = dist.ProcessGroupNCCL.Options()
    # NCCL ends the whole process when its own time limit passes, so that limit is longer than the caller's.
    options._timeout = 2 * limit
    return dist.ProcessGroupNCCL(store, membership.rank, membership.world_size, options)
