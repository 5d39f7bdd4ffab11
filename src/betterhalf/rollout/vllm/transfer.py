"""Transfer of weights to the child: by a file in shared memory, or by handles of GPU memory.

Handles may also come from a rank on the same GPU; see `rollout.handles`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from betterhalf.rollout.handles import handles_of, parts_of
from betterhalf.rollout.weight_arrivals import Shapes, WeightArrivals
from betterhalf.rollout.weight_group import Layout

Ask = Callable[..., Any]
"""`ServerProcess.ask`."""

_SHARED_MEMORY = Path("/dev/shm")


def checked(
    weights: Iterable[tuple[str, Tensor]], shapes: Shapes, *, held: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight after a check of its name and shape; a tied head that arrives beside its embedding is skipped.

    With `held`, weights may be missing, because the engine already holds them.

    Raises:
        EngineError: a name is unknown, missing or repeated, or a shape is wrong.
    """
    arrivals = WeightArrivals(shapes, held=held)
    for name, tensor in weights:
        if name == "lm_head.weight" and name not in shapes:
            continue
        arrivals.check(name, tensor)
        yield name, tensor.detach()
    arrivals.finish()


def check_layout(layout: Layout, shapes: Shapes) -> None:
    """Check names and shapes of weights before they are sent; a tied head may be listed beside its embedding.

    Raises:
        EngineError: a name is unknown, missing or repeated, or a shape is wrong.
    """
    arrivals = WeightArrivals(shapes)
    for one in layout:
        if one.name != "lm_head.weight" or one.name in shapes:
            arrivals.check(one.name, one)
    arrivals.finish()


def send_file(ask: Ask, weights: Iterable[tuple[str, Tensor]]) -> torch.dtype | None:
    """Send weights in one file in shared memory, or in the temporary folder if shared memory lacks space.

    Returns:
        The wire dtype; None without any weights.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights}
    if not tensors:
        return None
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    with tempfile.TemporaryDirectory(prefix="betterhalf-weights-", dir=_folder_for(size)) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(tensors, path)
        ask("load_file", path=str(path))
    return next(iter(tensors.values())).dtype


def _folder_for(size: int) -> Path | None:
    """Return the folder of shared memory if it has twice the size free, else None for the temporary folder."""
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 2 * size:
        return _SHARED_MEMORY
    return None


def send_handles(ask: Ask, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> torch.dtype:
    """Send weights through vLLM's weight-transfer API by CUDA IPC handles, about a GiB at a time.

    A handle keeps its memory alive until the child has released it, so each part may be freed when its call returns.

    Returns:
        The wire dtype.
    """
    dtype = torch.get_default_dtype()
    ask("begin_update")
    for part in parts_of(weights):
        ask("update", info=handles_of(part, device))
        dtype = part[0][1].dtype
    ask("finish_update")
    torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
    return dtype
