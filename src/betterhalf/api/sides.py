"""The precision contract for other trainers: what can be read from tensors is read, and the rest is declared.

The weights are compared by digest, tensor by tensor, and their formats are those of the tensors. No tensor shows in
which format a module computes under autocast, nor how an engine stores keys and values: the caller declares those, and
the contract says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from betterhalf.errors import InputError
from betterhalf.precision.contract import Contract, SideReport, compare, tensor_digest
from betterhalf.precision.formats import HARDWARE, dtype_name, most_common_dtype, torch_dtype
from betterhalf.types import DtypeName

Weights = nn.Module | Mapping[str, Tensor]
"""Module or tensors by their unfused Hugging Face names."""


def side_report(
    side: Literal["trainer", "engine"],
    weights: Weights,
    *,
    compute_dtype: str | torch.dtype,
    kv_dtype: str | torch.dtype | None = None,
    facts: Mapping[str, str] | None = None,
) -> SideReport:
    """Return the report of one side of another framework, for `contract`.

    Args:
        side: the trainer's weights are rounded once to `compute_dtype` before their digest, as a weight sync does; the
            engine's are taken as it holds them.
        weights: module, or tensors by name. Both sides must use the unfused Hugging Face names; a tied head counts
            once. Sharded parameters have to be gathered first.
        compute_dtype: format of the forward pass: `fp16`, `bf16`, `fp32`, or torch's names and dtypes.
        kv_dtype: format of cached keys and values, for an engine; `auto` for its compute dtype.
        facts: further values to show, such as the attention backend.

    Raises:
        InputError: a format is unknown, an engine has no `kv_dtype`, or there are no floating-point weights.
    """
    compute = _format(compute_dtype, "compute_dtype")
    tensors = dict(_tensors(weights))
    if not tensors:
        raise InputError(f"the {side} has no floating-point weights. Pass a module, or tensors by name.")
    held = _held(tensors.values())
    if side == "trainer":
        dtypes: dict[str, DtypeName] = {"weights": held, "compute": compute, "wire": compute}
        rounded = torch_dtype(compute)
        digests = {name: tensor_digest(tensor.to(rounded)) for name, tensor in tensors.items()}
    else:
        if kv_dtype is None:
            raise InputError("an engine needs kv_dtype, which its weights do not show. Pass 'auto' if it is the same.")
        kv = compute if kv_dtype == "auto" else _format(kv_dtype, "kv_dtype")
        dtypes = {"weights": held, "compute": compute, "wire": held, "kv": kv}
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    declared = {"declared": "compute" if side == "trainer" else "compute, kv"}
    return SideReport(side=side, dtypes=dtypes, facts={**declared, **(facts or {})}, digests=digests)


def contract(trainer: SideReport, engine: SideReport, *, allow_difference: bool = False) -> Contract:
    """Compare the reports of a trainer and of an engine.

    Equality is required of the compute dtype, the dtype of the engine's weights, that of keys and values, and of the
    weights themselves. `Contract.ok` is the verdict, `Contract.table()` the whole as text.

    Args:
        trainer: from `side_report("trainer", ...)`.
        engine: from `side_report("engine", ...)`.
        allow_difference: count a difference as intended.

    Raises:
        InputError: the reports are given in the wrong order, or both are of the same side.
    """
    if (trainer.side, engine.side) != ("trainer", "engine"):
        raise InputError(f"contract takes the trainer and then the engine, but got {trainer.side} and {engine.side}.")
    return compare(trainer, engine, allow_difference=allow_difference)


def _tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors by name, without those that share their memory with an earlier one."""
    named = weights.named_parameters() if isinstance(weights, nn.Module) else weights.items()
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in named:
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.is_floating_point() and (tensor.numel() == 0 or place not in seen):
            seen.add(place)
            yield name, tensor.detach()


def _held(tensors: Iterable[Tensor]) -> DtypeName:
    """Return the format that most numbers have; raise as `_format` does."""
    return _format(most_common_dtype(tensors), "weights")


def _format(given: str | torch.dtype, name: str) -> DtypeName:
    """Return betterhalf's name of a format, given that name, torch's name or a torch dtype.

    Raises:
        InputError: it is none of them.
    """
    for known in HARDWARE:
        if given == known:
            return known
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if isinstance(dtype, torch.dtype):
        with contextlib.suppress(KeyError):
            return dtype_name(dtype)
    raise InputError(f"{name}={given} is not a format. Use {', '.join(HARDWARE)}, or torch's names.")
