"""Headroom and underflow of values in a format: the arithmetic behind the range census of `doctor`.

Magnitudes are those of FP32 values, the reference; overflow and underflow in a narrower format are computed from its
`FormatFacts`. `examine.census` collects the magnitudes from a real forward and backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from betterhalf.precision.formats import FORMATS, HARDWARE, FormatFacts
from betterhalf.types import DtypeName

Kind = Literal["input", "forward", "backward", "weight", "gradient"]
"""Values that were measured at a module: its input (where that is not the output of another module), its output, the
gradient with respect to its output, its parameters, or their gradients."""

KINDS: tuple[Kind, ...] = ("input", "forward", "backward", "weight", "gradient")
"""All kinds, in the order of a census."""

BACKWARD_KINDS: frozenset[Kind] = frozenset({"backward", "gradient"})
"""Kinds that a loss scale multiplies."""

MAX_LOSS_SCALE = 2.0**32
"""Largest loss scale that is considered: gradients for which it is safe would not profit from a larger one."""

_WORDS: dict[Kind, str] = {
    "input": "the input of {}",
    "forward": "the output of {}",
    "backward": "the gradient with respect to the output of {}",
    "weight": "the weight of {}",
    "gradient": "the weight gradient of {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitudes:
    """Magnitudes of a set of FP32 values. Tuples have one entry for each of `HARDWARE`, in its order."""

    max_abs: float
    """Largest magnitude; infinity when a value is not finite."""
    nonzero: int
    """Number of values that are not zero."""
    subnormal: tuple[int, ...]
    """Number of values that are subnormal in the format, where they lose bits, but do not round to zero."""
    zeroed: tuple[int, ...]
    """Number of values other than zero that round to zero in the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A place in the model: a module, and one kind of its values."""

    module: str
    """Name of the module, as in `named_modules`."""
    kind: Kind

    def __str__(self) -> str:
        """Return the spot in words, such as `the output of model.layers.3.mlp.down_proj`."""
        return _WORDS[self.kind].format(self.module)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRange:
    """One row of a census: the fit of one kind of a module's values into a format, at loss scale 1."""

    spot: Spot
    max_abs: float
    """Largest magnitude in FP32."""
    headroom_bits: float
    """log2 of (largest number of the format / `max_abs`); negative on overflow, infinite for zeros. The format is the
    one that holds the values: FP32 within an FP32 island."""
    subnormal_fraction: float
    """Share of the non-zero values that are subnormal in the format, where they lose bits."""
    zero_fraction: float
    """Share of the non-zero values that round to zero in the format."""
    finite: bool
    """True if the values were finite in the real pass in this precision."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as in `doctor.json`."""
        return {
            "module": self.spot.module,
            "kind": self.spot.kind,
            "max_abs": self.max_abs,
            "headroom_bits": self.headroom_bits,
            "subnormal_fraction": self.subnormal_fraction,
            "zero_fraction": self.zero_fraction,
            "finite": self.finite,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Ranges of one model in one precision, forward and backward, and the results of the real passes."""

    dtype: DtypeName
    ranges: tuple[ModuleRange, ...]
    """In model order."""
    first_forward: Spot | None
    """First spot that is not finite in the real forward pass; None if all of it is finite."""
    first_backward: Spot | None
    """First spot that is not finite in the real backward pass at loss scale 1, in backward order; None without one."""
    largest_safe_loss_scale: float | None
    """Largest power of two at which the real backward pass is finite; a prediction if below 1; None if already the
    forward pass is not finite."""
    loss_scale: float
    """Recommended initial loss scale: a quarter of the largest safe one, at least 1; 1 in formats without scaling."""
    zeroed_fraction: float | None
    """Share of the non-zero FP32 parameter gradients that are zero at the largest safe loss scale; None without one."""
    zeroed_fraction_unscaled: float | None
    """Share of the same gradients that are zero at loss scale 1; None if the pass is not finite there."""
    zeroed_modules: tuple[str, ...] = ()
    """Modules that lose the most gradient entries to zero at the largest safe scale, worst first."""
    predicted: str | None = None
    """Reason why no pass could run in this precision, so that everything is predicted from the FP32 magnitudes; None if
    passes ran."""

    @property
    def max(self) -> float:
        """Largest number of the format."""
        return FORMATS[self.dtype].max

    def to_json(self) -> dict[str, Any]:
        """Return the census as in `doctor.json`."""
        return {
            "modules": [row.to_json() for row in self.ranges],
            "largest_safe_loss_scale": self.largest_safe_loss_scale,
            "loss_scale": self.loss_scale,
            "zeroed_fraction": self.zeroed_fraction,
            "zeroed_fraction_unscaled": self.zeroed_fraction_unscaled,
            "predicted": self.predicted,
        }


_AT_ONCE = 2**20
"""Values examined at once: their temporaries of 4 MiB stay in a CPU's cache, however large the tensor is."""


def magnitudes(x: Tensor) -> Magnitudes:
    """Return the magnitudes of `x`: FP32, any shape, not empty."""
    return reduce(together, map(_magnitudes, torch.split(x.detach().reshape(-1), _AT_ONCE)))


def _magnitudes(x: Tensor) -> Magnitudes:
    sizes = x.abs()
    largest, nonzero = float(sizes.max()), _count(sizes)
    zeros = sizes.numel() - nonzero
    subnormal, zeroed, clear = [], [], 0.0
    for facts in (FORMATS[name] for name in HARDWARE):
        # NaN compares false with everything, so it counts as neither subnormal nor zeroed.
        tiny = _count(sizes < facts.min_normal) - zeros if facts.min_normal > clear else 0
        if not tiny:
            clear = max(clear, facts.min_normal)
        lost = _count(sizes <= facts.min_subnormal / 2) - zeros if tiny else 0
        subnormal.append(tiny - lost)
        zeroed.append(lost)
    return Magnitudes(
        max_abs=largest if math.isfinite(largest) else math.inf,
        nonzero=nonzero,
        subnormal=tuple(subnormal),
        zeroed=tuple(zeroed),
    )


def _count(x: Tensor) -> int:
    """Return the number of values that are not zero; a sum of booleans takes four times as long."""
    return int(torch.count_nonzero(x))


def all_finite(x: Tensor) -> bool:
    """Return whether no value is infinite or NaN; ten times as fast as `isfinite` of each."""
    return not x.numel() or all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(x)).tolist())


def together(first: Magnitudes, second: Magnitudes) -> Magnitudes:
    """Return the magnitudes of two sets of values together."""
    return Magnitudes(
        max_abs=max(first.max_abs, second.max_abs),
        nonzero=first.nonzero + second.nonzero,
        subnormal=tuple(a + b for a, b in zip(first.subnormal, second.subnormal, strict=True)),
        zeroed=tuple(a + b for a, b in zip(first.zeroed, second.zeroed, strict=True)),
    )


def headroom_bits(max_abs: float, facts: FormatFacts) -> float:
    """Return log2(largest number / max_abs), the bits left before overflow; infinite for 0, -infinity for infinity."""
    if max_abs == 0.0:
        return math.inf
    return -math.inf if math.isinf(max_abs) else math.log2(facts.max / max_abs)


def module_range(spot: Spot, sizes: Magnitudes, held: DtypeName, *, finite: bool) -> ModuleRange:
    """Return the census row of values with these magnitudes, held in the format `held`."""
    place, share = HARDWARE.index(held), 1 / max(1, sizes.nonzero)
    return ModuleRange(
        spot=spot,
        max_abs=sizes.max_abs,
        headroom_bits=headroom_bits(sizes.max_abs, FORMATS[held]),
        subnormal_fraction=sizes.subnormal[place] * share,
        zero_fraction=sizes.zeroed[place] * share,
        finite=finite,
    )


def predicted_loss_scale(max_gradient: float, facts: FormatFacts) -> float:
    """Return the largest power of two, at most 2^32, with which values up to `max_gradient` stay finite in the format.

    It is 0 if `max_gradient` is infinite.
    """
    headroom = headroom_bits(max_gradient, facts)
    if math.isinf(headroom):
        return MAX_LOSS_SCALE if headroom > 0 else 0.0
    return min(MAX_LOSS_SCALE, 2.0 ** math.floor(headroom))


def starting_loss_scale(largest_safe: float | None) -> float:
    """Return a quarter of the largest safe loss scale, which leaves room for larger gradients; at least 1."""
    return max(1.0, (largest_safe or 0.0) / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeroed:
    """Gradient entries that are zero in a precision, but not in FP32."""

    fraction: float
    """Share of the entries that are not zero in FP32; 0 when there are none."""
    worst: tuple[str, ...]
    """Parameters that lost entries, the one with most of them first."""


def zeroed_gradients(nonzero: Mapping[str, Tensor], gradients: Iterable[tuple[str, Tensor]]) -> Zeroed:
    """Compare one precision's gradients with the FP32 trainer's.

    Args:
        nonzero: parameter -> bool mask of the entries of its FP32 gradient that are not zero.
        gradients: (parameter, gradient) in the precision under test, the same shapes.
    """
    lost = {name: _count(nonzero[name] & (gradient == 0)) for name, gradient in gradients}
    total = sum(_count(nonzero[name]) for name in lost)
    worst = sorted((name for name in lost if lost[name]), key=lambda name: -lost[name])
    return Zeroed(fraction=sum(lost.values()) / max(1, total), worst=tuple(worst))
