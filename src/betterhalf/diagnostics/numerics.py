"""How close values come to the ends of a format: the arithmetic behind the range census of `doctor`.

Magnitudes are taken of FP32 values, which are the truth; what a narrower format would make of them follows from its
facts. `runs.census` gathers them from a real forward and backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from betterhalf.precision.formats import FORMATS, FormatFacts
from betterhalf.types import DtypeName

Kind = Literal["input", "forward", "backward", "weight", "gradient"]
"""What was measured of a module: its input where no other module's output is that, its output, the gradient with
respect to its output, its parameters, their gradients."""

KINDS: tuple[Kind, ...] = ("input", "forward", "backward", "weight", "gradient")
"""In the order of a census."""

BACKWARD_KINDS: frozenset[Kind] = frozenset({"backward", "gradient"})
"""What a loss scale multiplies."""

MAX_LOSS_SCALE = 2.0**32
"""No larger loss scale is looked for: gradients that small have lost nothing that more would bring back."""

_WORDS: dict[Kind, str] = {
    "input": "the input of {}",
    "forward": "the output of {}",
    "backward": "the gradient with respect to the output of {}",
    "weight": "the weight of {}",
    "gradient": "the weight gradient of {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitudes:
    """The sizes of some FP32 values. Tuples have one entry for each of `FORMATS`, in its order."""

    max_abs: float
    """Largest magnitude; infinity when a value is not finite."""
    nonzero: int
    """Values that are not zero."""
    subnormal: tuple[int, ...]
    """Values below the format's smallest normal number that do not round to zero in it: they lose bits."""
    zeroed: tuple[int, ...]
    """Values other than zero that round to zero in the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A place in the model: where a value is not finite, or the largest of its kind."""

    module: str
    """As in `named_modules`."""
    kind: Kind

    def __str__(self) -> str:
        """In words, for a reason: `the output of model.layers.3.mlp.down_proj`."""
        return _WORDS[self.kind].format(self.module)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRange:
    """One row of a census: how one kind of a module's values fits a format, at loss scale 1."""

    spot: Spot
    max_abs: float
    """Largest magnitude in FP32."""
    headroom_bits: float
    """log2 of the format's largest number over `max_abs`; negative when it overflows, infinite for zeros. Of the
    format that really holds the values: FP32 within an FP32 island."""
    subnormal_fraction: float
    """Share of the non-zero values that the format holds with fewer bits."""
    zero_fraction: float
    """Share of the non-zero values that it rounds to zero."""
    finite: bool
    """Whether the values were finite in the real pass in this precision."""

    def to_json(self) -> dict[str, Any]:
        """The row as in `doctor.json`."""
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
    """The ranges of one model in one precision, forward and backward, and what the real passes gave."""

    dtype: DtypeName
    ranges: tuple[ModuleRange, ...]
    """In model order."""
    first_forward: Spot | None
    """Where the real forward pass first left the format; None when all of it is finite."""
    first_backward: Spot | None
    """Where the real backward pass at loss scale 1 first left the format, in backward order."""
    largest_safe_loss_scale: float | None
    """Largest power of two at which the real backward pass is finite; below 1 it is a prediction; None when the
    forward pass is not finite already."""
    loss_scale: float
    """Where to start: a quarter of the largest safe one, and at least 1; 1 in formats without loss scaling."""
    zeroed_fraction: float | None
    """Share of the non-zero FP32 parameter gradients that are zero at the largest safe loss scale; None without one."""
    zeroed_fraction_unscaled: float | None
    """The same at loss scale 1; None when the pass is not finite there."""
    zeroed_modules: tuple[str, ...] = ()
    """Modules that lose the most gradient entries to zero at the largest safe scale, worst first."""

    @property
    def max(self) -> float:
        """Largest number of the format."""
        return FORMATS[self.dtype].max

    def to_json(self) -> dict[str, Any]:
        """The census as in `doctor.json`."""
        return {
            "modules": [row.to_json() for row in self.ranges],
            "largest_safe_loss_scale": self.largest_safe_loss_scale,
            "loss_scale": self.loss_scale,
            "zeroed_fraction": self.zeroed_fraction,
            "zeroed_fraction_unscaled": self.zeroed_fraction_unscaled,
        }


def magnitudes(x: Tensor) -> Magnitudes:
    """Sizes of the values of `x`: FP32, any shape, not empty."""
    sizes = x.detach().abs()
    largest, zeros = float(sizes.max()), int((sizes == 0).sum())
    # NaN compares false with everything, so that it counts as neither.
    zeroed = [int((sizes <= facts.min_subnormal / 2).sum()) - zeros for facts in FORMATS.values()]
    tiny = [int((sizes < facts.min_normal).sum()) - zeros for facts in FORMATS.values()]
    return Magnitudes(
        max_abs=largest if math.isfinite(largest) else math.inf,
        nonzero=sizes.numel() - zeros,
        subnormal=tuple(below - lost for below, lost in zip(tiny, zeroed, strict=True)),
        zeroed=tuple(zeroed),
    )


def together(first: Magnitudes, second: Magnitudes) -> Magnitudes:
    """Sizes of the values of both."""
    return Magnitudes(
        max_abs=max(first.max_abs, second.max_abs),
        nonzero=first.nonzero + second.nonzero,
        subnormal=tuple(a + b for a, b in zip(first.subnormal, second.subnormal, strict=True)),
        zeroed=tuple(a + b for a, b in zip(first.zeroed, second.zeroed, strict=True)),
    )


def headroom_bits(max_abs: float, facts: FormatFacts) -> float:
    """log2(largest number / max_abs): bits left before overflow; infinite for 0, minus infinity for infinity."""
    if max_abs == 0.0:
        return math.inf
    return -math.inf if math.isinf(max_abs) else math.log2(facts.max / max_abs)


def module_range(spot: Spot, sizes: Magnitudes, held: DtypeName, *, finite: bool) -> ModuleRange:
    """The row of values of these sizes, held in the format `held`."""
    place, share = list(FORMATS).index(held), 1 / max(1, sizes.nonzero)
    return ModuleRange(
        spot=spot,
        max_abs=sizes.max_abs,
        headroom_bits=headroom_bits(sizes.max_abs, FORMATS[held]),
        subnormal_fraction=sizes.subnormal[place] * share,
        zero_fraction=sizes.zeroed[place] * share,
        finite=finite,
    )


def predicted_loss_scale(max_gradient: float, facts: FormatFacts) -> float:
    """Largest power of two by which values up to `max_gradient` can be multiplied and stay finite; at most 2^32.

    0 when `max_gradient` is infinite.
    """
    headroom = headroom_bits(max_gradient, facts)
    if math.isinf(headroom):
        return MAX_LOSS_SCALE if headroom > 0 else 0.0
    return min(MAX_LOSS_SCALE, 2.0 ** math.floor(headroom))


def starting_loss_scale(largest_safe: float | None) -> float:
    """A quarter of the largest safe loss scale, for batches with larger gradients than the one seen; at least 1."""
    return max(1.0, (largest_safe or 0.0) / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeroed:
    """Gradient entries that a precision turned to zero."""

    fraction: float
    """Share of the entries that are not zero in FP32; 0 when there are none."""
    worst: tuple[str, ...]
    """Parameters that lost entries, the one with most of them first."""


def zeroed_gradients(nonzero: Mapping[str, Tensor], gradients: Iterable[tuple[str, Tensor]]) -> Zeroed:
    """Compare one precision's gradients with the FP32 trainer's.

    Args:
        nonzero: by parameter, bool: which entries of its FP32 gradient are not zero.
        gradients: (parameter, gradient) in the precision under test, the same shapes.
    """
    lost = {name: int((nonzero[name] & (gradient == 0)).sum()) for name, gradient in gradients}
    total = sum(int(nonzero[name].sum()) for name in lost)
    worst = sorted((name for name in lost if lost[name]), key=lambda name: -lost[name])
    return Zeroed(fraction=sum(lost.values()) / max(1, total), worst=tuple(worst))
