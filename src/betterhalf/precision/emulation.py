"""Emulated formats: BF16 numbers, rounded once more to fewer stored mantissa bits, to nearest, ties to even.

A result is rounded twice, from FP32 to BF16 and from there to the grid of the format, at exactly the points where BF16
rounds. The second rounding sees a tie wherever the first one ended halfway between two numbers of the grid, so a number
just beside such a tie may round to the other neighbour than it would in hardware of that format.

An operation's sums keep the format that they have in BF16. The engine rounds by `to_format`. The trainer runs inside
`rounding_results`, which rounds what every operation returns in BF16, forward and backward; FP32 results stay FP32.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from betterhalf.precision.c_library import c_library
from betterhalf.precision.formats import CARRIER, FORMATS, is_emulated, torch_dtype
from betterhalf.types import DtypeName


def to_format(x: Tensor, name: DtypeName, container: torch.dtype | None = None) -> Tensor:
    """Return `x` rounded to a format; not differentiable where the format is emulated.

    Args:
        x: any shape and floating dtype.
        name: a format; an emulated one rounds to BF16 first.
        container: dtype of the result: the format's own, which is the default, or FP32.

    Returns:
        Numbers of the format. For a hardware format the result may be `x` itself, as with `Tensor.to`; for an emulated
        one it is always a new tensor.
    """
    own = torch_dtype(name)
    container = own if container is None else container
    if not is_emulated(name):
        return x.to(own).to(container)
    source = x.to(container).contiguous()
    out = torch.empty_like(source) if source.data_ptr() == x.data_ptr() else source
    _round(source, out, _dropped(name))
    return out


def emulation_facts(*names: DtypeName) -> dict[str, str]:
    """Return the facts of a side's emulated formats for the contract; none for hardware formats."""
    emulated = [name for name in dict.fromkeys(names) if is_emulated(name)]
    by = "torch" if _kernels() is None else "a C kernel"
    return {"emulated": f"{', '.join(emulated)}: bf16 rounded once more, by {by}"} if emulated else {}


def rounding_results(name: DtypeName) -> AbstractContextManager[object]:
    """Return a context in which every BF16 result is rounded to the format; it does nothing for hardware formats."""
    return _RoundResults(_dropped(name)) if is_emulated(name) else nullcontext()


def _dropped(name: DtypeName) -> int:
    """Return the number of BF16's mantissa bits that the format does not store."""
    return FORMATS["bf16"].significand_bits - FORMATS[name].significand_bits


# -- kernels


@cache
def _kernels() -> ctypes.CDLL | None:
    """Return the compiled functions; None without a compiler."""
    library = c_library("emulation.c")
    if library is not None:
        for function in (library.round_bf16, library.round_fp32):
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
            function.restype = None
    return library


def _round(x: Tensor, out: Tensor, dropped: int) -> None:
    """Write `x`, BF16 or FP32, rounded to the grid, to `out`: the same tensor, or one with the same dense strides."""
    library = _kernels()
    if library is None:
        _round_by_torch(x, out, dropped)
        return
    function = library.round_bf16 if x.dtype == CARRIER else library.round_fp32
    function(x.data_ptr(), out.data_ptr(), x.numel(), dropped)


def _round_by_torch(x: Tensor, out: Tensor, dropped: int) -> None:
    """Do the same with torch operations, for any strides."""
    bits = x.to(CARRIER).view(torch.int16)
    half = (1 << dropped >> 1) - 1 if dropped else 0
    rounded = (bits + half + ((bits >> dropped) & bool(dropped))).bitwise_and_(-1 << dropped)
    out.copy_(torch.where((bits & 0x7FFF) > 0x7F80, bits, rounded).view(CARRIER))


# -- the trainer


class _RoundResults(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Round every BF16 result in place, below autograd: what is saved for a backward pass is rounded too."""

    def __init__(self, dropped: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dropped = dropped

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would wrap every call to hide it from torch.compile, which is refused here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(out, Tensor):
            if out.dtype is CARRIER and _computes(func):
                self._round_in_place(out)
        elif isinstance(out, tuple | list) and _computes(func):
            for part in out:
                if isinstance(part, Tensor) and part.dtype is CARRIER:
                    self._round_in_place(part)
        return out

    def _round_in_place(self, x: Tensor) -> None:
        if x.layout is torch.sparse_coo:
            x = x._values()
        if x.is_contiguous() or _is_dense(x.shape, x.stride()):
            _round(x, x, self._dropped)
        else:
            _round_by_torch(x, x, self._dropped)


@lru_cache(maxsize=1024)
def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Return whether a tensor of these strides fills its memory without gaps, in some order of its axes."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        *("clone", "cat", "stack", "index", "index_select", "gather", "embedding", "constant_pad_nd", "repeat"),
        *("slice_backward", "select_backward", "neg", "alias", "lift_fresh", "zeros", "zeros_like", "new_zeros"),
        *("ones", "ones_like", "new_ones", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        "_unsafe_view",
    )
)
"""Operations whose results are numbers that exist already; they need no rounding. Views are recognised as such."""


@cache
def _computes(func: Any) -> bool:
    """Return whether an operation may return new numbers."""
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    is_view = alias is not None and not alias.is_write
    return not is_view and func.name().partition(".")[0] not in _MOVES
