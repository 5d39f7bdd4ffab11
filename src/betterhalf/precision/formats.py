"""Floating-point formats: their facts, their torch dtypes, and emulated rounding to formats without hardware."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from betterhalf.types import DtypeName, EmulatedDtype, HardwareDtype

HARDWARE: tuple[HardwareDtype, ...] = get_args(HardwareDtype)
"""Formats that processors compute in, in the order of tables."""
EMULATED: tuple[EmulatedDtype, ...] = get_args(EmulatedDtype)
"""Emulated formats, the coarsest first; `precision.emulation` rounds to them."""

CARRIER = torch.bfloat16
"""dtype of the tensors that hold numbers of an emulated format."""

_TORCH_DTYPES: dict[DtypeName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES: dict[torch.dtype, DtypeName] = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def is_emulated(name: DtypeName) -> bool:
    """Return True for a format that no processor computes in."""
    return name not in HARDWARE


def torch_dtype(name: DtypeName) -> torch.dtype:
    """Return the torch dtype of tensors that hold numbers of a format: BF16 for an emulated one."""
    return CARRIER if is_emulated(name) else _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """Return the name of the format that a torch dtype stands for; never an emulated one.

    Raises:
        KeyError: the dtype is none of FP16, BF16 and FP32.
    """
    return _NAMES[dtype]


def most_common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype of most elements of one or more tensors."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0]


def dtype_keyword(name: DtypeName) -> str:
    """Return torch's name of the format without the prefix, such as `bfloat16`, for libraries that take it as text."""
    return str(torch_dtype(name)).removeprefix("torch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatFacts:
    """Binary format in the style of IEEE 754, with a sign bit, subnormal numbers and infinities; a subset of FP32."""

    significand_bits: int
    """Bits of precision, including the leading bit that is not stored: 11 for FP16, 8 for BF16, 24 for FP32."""
    exponent_bits: int
    """Bits of the exponent: 5 for FP16, 8 for BF16 and FP32."""

    def __post_init__(self) -> None:
        """Refuse formats that FP32 does not contain: `round_to_format` could not represent their numbers."""
        if not (1 <= self.significand_bits <= 24 and 2 <= self.exponent_bits <= 8):
            raise ValueError(
                f"FP32 does not contain a format of {self.significand_bits} significand and {self.exponent_bits} "
                "exponent bits; give 1 to 24 significand bits and 2 to 8 exponent bits"
            )

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest power of two: 15 for FP16, 127 for BF16 and FP32."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number: -14 for FP16, -126 for BF16 and FP32."""
        return 1 - self.max_exponent

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger number."""
        return 2.0 ** (1 - self.significand_bits)

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding to nearest in the normal range: half of `eps`."""
        return self.eps / 2

    @property
    def max(self) -> float:
        """Largest finite number."""
        return (2.0 - self.eps) * 2.0**self.max_exponent

    @property
    def min_normal(self) -> float:
        """Smallest positive number with full precision."""
        return 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number; half of it or less rounds to zero."""
        return self.min_normal * self.eps


FORMATS: dict[DtypeName, FormatFacts] = {
    "fp16": FormatFacts(significand_bits=11, exponent_bits=5),
    "bf16": FormatFacts(significand_bits=8, exponent_bits=8),
    "fp32": FormatFacts(significand_bits=24, exponent_bits=8),
    **{name: FormatFacts(significand_bits=1 + int(name.removeprefix("e8m")), exponent_bits=8) for name in EMULATED},
}
"""The formats that betterhalf computes in, the emulated ones last."""


def formats_table(names: Iterable[DtypeName] = HARDWARE) -> str:
    """Return formats as a Markdown table of docs/precision.md; spacings are exact powers of two."""
    formats = {name: FORMATS[name] for name in names}
    rows = {
        "significand bits (stored + 1)": [str(facts.significand_bits) for facts in formats.values()],
        "exponent bits": [str(facts.exponent_bits) for facts in formats.values()],
        "eps: from 1 to the next number": [_power(facts.eps) for facts in formats.values()],
        "unit roundoff": [_power(facts.unit_roundoff) for facts in formats.values()],
        "largest finite": [f"{facts.max:.8g}" for facts in formats.values()],
        "smallest normal": [_power(facts.min_normal) for facts in formats.values()],
        "smallest subnormal": [_power(facts.min_subnormal) for facts in formats.values()],
    }
    lines = ["| | " + " | ".join(formats) + " |", "|---" * (len(formats) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    return "\n".join(lines)


def narrowest_format(x: Tensor) -> DtypeName:
    """Return the coarsest format, emulated ones included, that represents all values of `x` exactly; BF16 before FP16.

    A few dozen values computed in one format are not representable in another by chance, so this shows which format a
    computation was rounded to, even when its half values are held in FP32 tensors. Zeros and non-finite values are
    ignored. With fewer than 16 other values the result is the tensor's dtype; an emulated format, which BF16 values are
    more likely to fit by chance, needs 24.
    """
    telling = x[x.isfinite() & (x != 0)]
    if telling.numel() < 16:
        return dtype_name(x.dtype)
    halves: tuple[DtypeName, ...] = ("bf16", "fp16")
    candidates = (*EMULATED, *halves) if telling.numel() >= 24 else halves
    return next((name for name in candidates if is_on_grid(telling, name)), "fp32")


def is_on_grid(x: Tensor, name: DtypeName) -> bool:
    """Return whether a format represents every value of `x` exactly; NaN is on no grid."""
    held = x.to(torch_dtype(name))
    exact = torch.equal(held.to(x.dtype), x)
    return exact and not (is_emulated(name) and bool((held.view(torch.int16) & _unused_bits(name)).any()))


def _unused_bits(name: DtypeName) -> int:
    """Return a mask of the mantissa bits of BF16 that an emulated format does not store."""
    return (1 << (FORMATS["bf16"].significand_bits - FORMATS[name].significand_bits)) - 1


def held_format(x: Tensor, name: DtypeName) -> DtypeName:
    """Return `name` if `x` holds numbers of that format in its torch dtype; otherwise the format of the dtype."""
    emulated = is_emulated(name) and x.dtype == torch_dtype(name)
    return name if emulated and is_on_grid(x, name) else dtype_name(x.dtype)


def _power(value: float) -> str:
    return f"2^{math.frexp(value)[1] - 1} = {value:.4g}"


def round_to_format(x: Tensor, target: DtypeName | FormatFacts) -> Tensor:
    """Round once to the nearest number of the format, ties to even; overflow gives infinity, NaN stays NaN.

    The result keeps the dtype of `x`, so that formats without hardware, such as 9 significand bits, can be studied.
    FP64 input is rounded directly, while torch's cast to half goes through FP32 and rounds twice.

    Args:
        x: float32 or float64, any shape.
        target: name or facts of the format.

    Returns:
        Numbers of the format, in the dtype of `x`.
    """
    assert x.dtype in (torch.float32, torch.float64), f"rounding is emulated on FP32 and FP64, not on {x.dtype}"
    facts = FORMATS[target] if isinstance(target, str) else target
    wide = x.double()
    exponent = (torch.frexp(wide).exponent.long() - 1).clamp(min=facts.min_exponent)
    quantum = _power_of_two(exponent - (facts.significand_bits - 1))
    rounded = torch.round(wide / quantum) * quantum
    rounded = torch.where(rounded.abs() > facts.max, rounded.sign() * torch.inf, rounded)
    return torch.where(wide.isfinite(), rounded, wide).to(x.dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return exactly 2^exponent in float64, assembled from bits: torch's vectorised power may be off by one unit."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
