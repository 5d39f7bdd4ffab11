"""Transfer of packs from host memory to the trainer's device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from betterhalf.batches import MicroBatch
from betterhalf.token_support import PackedSupport


def on_device(pack: MicroBatch, device: torch.device) -> MicroBatch:
    """Return the pack with its tensors on `device`; the same object if they are there already."""
    if pack.token_ids_T.device == device:
        return pack
    moved = replace(pack, **_tensors_on(pack, device))
    if pack.support is not None:
        moved = replace(moved, support=replace(pack.support, **_tensors_on(pack.support, device)))
    return moved


def _tensors_on(record: MicroBatch | PackedSupport, device: torch.device) -> dict[str, Any]:
    """Return the tensor fields of a record, moved to the device."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
