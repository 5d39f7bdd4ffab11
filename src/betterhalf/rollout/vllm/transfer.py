"""Ways of the weights into the child: a file in shared memory, or handles of GPU memory."""

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

from betterhalf.errors import EngineError

Ask = Callable[..., Any]
"""`ServerProcess.ask`."""

_SHARED_MEMORY = Path("/dev/shm")
_AT_ONCE = 2**30
"""Bytes of weights behind the handles of one call."""


def checked(weights: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The weights as they come, each looked at; a tied head that arrives besides its embedding is left out.

    Raises:
        EngineError: a name is unknown, missing or repeated, or a shape is wrong.
    """
    missing = set(shapes)
    for name, tensor in weights:
        if name == "lm_head.weight" and name not in shapes:
            continue
        _check(name, tensor, shapes, missing)
        missing.discard(name)
        yield name, tensor.detach()
    if missing:
        raise EngineError(
            f"{len(missing)} weights did not arrive at the engine, {min(missing)!r} among them; "
            "send every weight on each sync"
        )


def _check(name: str, tensor: Tensor, shapes: dict[str, tuple[int, ...]], missing: set[str]) -> None:
    if name not in shapes:
        raise EngineError(f"the engine has no weight {name!r}; send the unfused Hugging Face names of this model")
    if name not in missing:
        raise EngineError(f"weight {name!r} arrived twice in one sync; send each name once")
    if tuple(tensor.shape) != tuple(shapes[name]):
        raise EngineError(
            f"weight {name!r} has shape {tuple(tensor.shape)}, the engine's has {tuple(shapes[name])}; "
            "load the engine from the trainer's configuration"
        )


def send_file(ask: Ask, weights: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    """Through one file in shared memory, or in the temporary folder where that has no room; returns the wire dtype."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights}
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    with tempfile.TemporaryDirectory(prefix="betterhalf-weights-", dir=_folder_for(size)) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(tensors, path)
        ask("load_file", path=str(path))
    return next(iter(tensors.values())).dtype


def _folder_for(size: int) -> Path | None:
    """Shared memory, when it exists and holds twice the size; else None, the system's temporary folder."""
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 2 * size:
        return _SHARED_MEMORY
    return None


def send_handles(ask: Ask, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> torch.dtype:
    """Through vLLM's weight-transfer API with CUDA IPC handles, about a GiB at a time; returns the wire dtype.

    A handle keeps its memory alive until the child has let go of it, so each part may be freed when its call returns.
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
    """vLLM's `IPCWeightTransferUpdateInfo`, as a dictionary."""
    return {
        "names": [name for name, _ in part],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
        "shapes": [list(tensor.shape) for _, tensor in part],
        "ipc_handles": [{gpu: reduce_tensor(tensor)[1]} for _, tensor in part],  # type: ignore[no-untyped-call]
    }
