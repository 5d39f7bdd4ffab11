"""Facts of the floating-point formats, and their mapping to torch dtypes."""

from __future__ import annotations

import torch

from betterhalf.types import DtypeName

_TORCH_DTYPES: dict[DtypeName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES: dict[torch.dtype, DtypeName] = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The torch dtype of a format name."""
    return _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """The format name of a torch dtype; KeyError for integer and 64-bit dtypes."""
    return _NAMES[dtype]
