"""Handles of GPU memory (CUDA IPC), by which another process on the same GPU reads weights without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

_AT_ONCE = 2**30
"""Size in bytes at which a part is complete; one call sends the handles of one part."""


def parts_of(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the weights, as contiguous tensors, in parts of about a GiB."""
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        part.append((name, tensor.contiguous()))
        size += tensor.numel() * tensor.itemsize
        if size >= _AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def handles_of(part: list[tuple[str, Tensor]], device: torch.device) -> dict[str, Any]:
    """Return vLLM's `IPCWeightTransferUpdateInfo` as a dictionary, with handles on one GPU, keyed by its UUID.

    The caller must keep the tensors until the update has been loaded.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    return {
        "names": [name for name, _ in part],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
        "shapes": [list(tensor.shape) for _, tensor in part],
        "ipc_handles": [{gpu: reduce_tensor(tensor)[1]} for _, tensor in part],  # type: ignore[no-untyped-call]
    }


def merged(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the update infos of several GPUs for the same weights; each receiver picks the handles of its own GPU."""
    first = infos[0]
    assert all(info["names"] == first["names"] for info in infos), "ranks send the same parts"
    handles = [
        {gpu: handle for one in of_weight for gpu, handle in one.items()}
        for of_weight in zip(*(info["ipc_handles"] for info in infos), strict=True)
    ]
    return first | {"ipc_handles": handles}
