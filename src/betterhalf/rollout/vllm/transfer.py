"""Transfer of weights to the child: by a file in shared memory, or by handles of GPU memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from betterhalf.rollout.weight_arrivals import Shapes, WeightArrivals

Ask = Callable[..., Any]
"""`ServerProcess.ask`."""

_SHARED_MEMORY = Path("/dev/shm")
_AT_ONCE = 2**30
"""Bytes of weights that the handles of one call refer to."""


def checked(weights: Iterable[tuple[str, Tensor]], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as they come, after a check; a tied head that arrives beside its embedding is left out.

    Raises:
        EngineError: a name is unknown, missing or repeated, or a shape is wrong.
    """
    arrivals = WeightArrivals(shapes)
    for name, tensor in weights:
        if name == "lm_head.weight" and name not in shapes:
            continue
        arrivals.check(name, tensor)
        yield name, tensor.detach()
    arrivals.finish()


def send_file(ask: Ask, weights: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    """Send weights by one file in shared memory, or, without room there, in the temporary folder.

    Returns:
        The wire dtype.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights}
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    with tempfile.TemporaryDirectory(prefix="betterhalf-weights-", dir=_folder_for(size)) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(tensors, path)
        ask("load_file", path=str(path))
    return next(iter(tensors.values())).dtype


def _folder_for(size: int) -> Path | None:
    """Return the folder of shared memory if twice the size is free there, else None: the temporary folder."""
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 2 * size:
        return _SHARED_MEMORY
    return None


def send_handles(ask: Ask, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> torch.dtype:
    """Send weights through vLLM's weight-transfer API by CUDA IPC handles, about a GiB at a time.

    A handle keeps its memory alive until the child has released it, so each part may be freed when its call returns.

    Returns:
        The wire dtype.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    dtype = torch.get_default_dtype()
    ask("begin_update")
    for part in _parts(weights):
        ask("update", info=_handles(part, gpu))
        dtype = part[0][1].dtype
    ask("finish_update")
    torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
    return dtype


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
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


def _handles(part: list[tuple[str, Tensor]], gpu: str) -> dict[str, Any]:
    """Return vLLM's `IPCWeightTransferUpdateInfo` as a dictionary."""
    return {
        "names": [name for name, _ in part],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
        "shapes": [list(tensor.shape) for _, tensor in part],
        "ipc_handles": [{gpu: reduce_tensor(tensor)[1]} for _, tensor in part],  # type: ignore[no-untyped-call]
    }
