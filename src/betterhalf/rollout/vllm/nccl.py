"""Broadcast of weights to vLLM's workers by vLLM's own weight-transfer API over NCCL.

Rank 0 and each worker of each engine are members of one NCCL group. The two ends must agree on how tensors are packed:
both read it from `init_info`. vLLM is imported in rank 0 only when it sends, and never in the process of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from betterhalf.distributed.group import Membership
from betterhalf.errors import EngineError
from betterhalf.rollout.weight_group import Layout, require_layout

_BUFFER_BYTES = 2**28
"""Bytes of weights that are packed into one broadcast."""
_BUFFERS = 2
"""Number of broadcasts in progress at once; each has a buffer on every GPU."""

_T = TypeVar("_T")


def init_info(membership: Membership) -> dict[str, Any]:
    """Return vLLM's `NCCLWeightTransferInitInfo` as a dictionary.

    Args:
        membership: its rank is that of the engine's first worker.
    """
    return {
        "master_address": membership.host,
        "master_port": membership.port,
        "rank_offset": membership.rank,
        "world_size": membership.world_size,
        "packed": True,
        "packed_buffer_size_bytes": _BUFFER_BYTES,
        "packed_num_buffers": _BUFFERS,
    }


def update_info(layout: Layout) -> dict[str, Any]:
    """Return vLLM's `NCCLWeightTransferUpdateInfo` as a dictionary."""
    return {
        "names": [one.name for one in layout],
        "dtype_names": [str(one.dtype).removeprefix("torch.") for one in layout],
        "shapes": [list(one.shape) for one in layout],
    }


class WeightsOfOneSync:
    """Weights that vLLM's sender reads; implements its `WeightSource`."""

    def __init__(self, layout: Layout) -> None:
        """Describe the weights, which are later set as `weights`."""
        self._layout = layout
        self.weights: Iterable[tuple[str, Tensor]] = ()

    def metadata(self) -> list[Any]:
        """Return name, dtype and shape of each weight, as vLLM's `ParamMeta`."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(one.name, one.dtype, one.shape) for one in self._layout]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights."""
        return require_layout(self._layout, self.weights)


class ToldByController:
    """Client through which vLLM's sender would call the engines; implements its `VLLMWeightSyncClient`.

    No method does anything: the process that runs the loop calls every engine itself, at the same time as rank 0.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Do nothing: each engine is told to join with a rank of its own."""

    def start_weight_update(self) -> None:
        """Do nothing: each engine starts when it is told to receive."""

    def update_weights(self, update_info: Any) -> None:
        """Do nothing: each engine has the layout."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing: each engine finishes when it has received all."""


class NcclSender:
    """Sending end of a weight group, on rank 0, for vLLM engines; implements `WeightSender`."""

    def __init__(self, membership: Membership, device: torch.device, layout: Layout) -> None:
        """Join the group as rank 0.

        Raises:
            EngineError: a member did not join in time.
        """
        self._left = False
        self._source = WeightsOfOneSync(layout)
        self._sender = _within(membership.seconds, lambda: _open(membership, device, self._source))

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `WeightSender.send`."""
        # vLLM reads the weights on streams of its own, which do not wait for this one.
        torch.cuda.current_stream().synchronize()
        self._source.weights = weights
        try:
            self._sender.send_weights()
        finally:
            self._source.weights = ()
        if self._left:
            # After `leave`, operations of the group neither do nor raise anything.
            raise EngineError("rank 0 left the weight group before all weights were sent")

    def leave(self) -> None:
        """See `WeightSender.leave`."""
        self._left = True
        self._sender.shutdown()


def _open(membership: Membership, device: torch.device, source: Any) -> Any:
    """Return vLLM's sender, once all members have joined."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    torch.cuda.set_device(device)
    return WeightTransferTrainerFactory.trainer_init(
        NCCLTrainerInitInfo(
            rank=0,
            master_address=membership.host,
            master_port=membership.port,
            world_size=membership.world_size,
            packed=True,
            packed_buffer_size_bytes=_BUFFER_BYTES,
            packed_num_buffers=_BUFFERS,
        ),
        client=ToldByController(),
        source=source,
    )


def _within(seconds: float, act: Callable[[], _T]) -> _T:
    """Return the result of `act()`, run in a thread that is abandoned after the time limit.

    Nothing can interrupt NCCL while it connects.

    Raises:
        EngineError: the time limit has passed.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="weight group", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise EngineError(f"the engines did not join within {seconds:g} s; raise cluster.collective_seconds")
    return results[0]
