"""Axes of a figure: a range that fits the data, the mapping of values to pixels, ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log10", "log2"]
"""Mapping of values to distance along an axis."""

_SUPERSCRIPTS = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")
_MANTISSAS = (1.0, 2.0, 5.0)
_TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values mapped to a range of pixels."""

    scale: Scale
    low: float
    """Value at `start`; positive on a logarithmic axis."""
    high: float
    """Value at `end`; above `low`."""
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`; may be before `start`, as on a vertical axis."""

    def pixel(self, value: float) -> float:
        """Return the pixel of `value`; values outside the range map to its edge."""
        low, high, at = (_distance(self.scale, v) for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values within the range, ascending."""
        if self.scale == "linear":
            return _linear_ticks(self.low, self.high, count)
        return _power_ticks(self.low, self.high, 2 if self.scale == "log2" else 10, count)

    def label(self, value: float) -> str:
        """Return the label of the tick at `value`."""
        if self.scale == "log2":
            return f"2{superscript(round(math.log2(value)))}"
        if self.scale == "log10":
            return _log_label(value)
        return _linear_label(value, self.ticks())


def fit(
    values: Iterable[float], *, scale: Scale, start: float, end: float, include: Iterable[float] = ()
) -> Axis | None:
    """Return an axis whose round bounds contain all finite `values` and `include`; None if no value can be drawn.

    On a logarithmic axis, zero and negative values cannot be drawn and are ignored.
    """
    drawable = [value for value in values if can_draw(scale, value)]
    if not drawable:
        return None
    spread = [*drawable, *include]
    low, high = _BOUNDS[scale](min(spread), max(spread))
    return Axis(scale=scale, low=low, high=high, start=start, end=end)


def steps_axis(steps: Iterable[int], *, start: float, end: float) -> Axis:
    """Return the horizontal axis of steps, exactly as long as the run."""
    seen = list(steps)
    low, high = min(seen), max(seen)
    if low == high:
        return Axis(scale="linear", low=low - 0.5, high=high + 0.5, start=start, end=end)
    return Axis(scale="linear", low=low, high=high, start=start, end=end)


def step_ticks(axis: Axis) -> list[int]:
    """Return the steps to label: the first, and round ones far enough from it."""
    first, last = math.ceil(axis.low), math.floor(axis.high)
    step = max(1, round(nice_step((last - first) / 5 or 1)))
    gap = 0.6 * step
    return [first, *(n for n in range(step, last + 1, step) if n - first >= gap)]


def can_draw(scale: Scale, value: float) -> bool:
    """Return whether `value` can be drawn on an axis with this scale."""
    return math.isfinite(value) and (scale == "linear" or value > _TINY)


def nice_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least `rough`, which is positive."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (*_MANTISSAS, 10.0) if m * power >= rough * (1 - 1e-9))


def superscript(exponent: int) -> str:
    """Return an exponent, such as -8, in superscript characters."""
    return str(exponent).translate(_SUPERSCRIPTS)


def _distance(scale: Scale, value: float) -> float:
    if scale == "linear":
        return value
    return math.log2(max(value, _TINY)) if scale == "log2" else math.log10(max(value, _TINY))


def _linear_bounds(low: float, high: float) -> tuple[float, float]:
    if low == high:
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    step = nice_step((high - low) / 4)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _log10_bounds(low: float, high: float) -> tuple[float, float]:
    """Return the nearest 1, 2 or 5 times a power of ten on either side."""
    below = max(value for value in _around(low) if value <= low * (1 + 1e-9))
    above = min(value for value in _around(high) if value >= high * (1 - 1e-9))
    return (below, above) if below < above else (below / 10, above * 10)


def _around(value: float) -> list[float]:
    power = math.floor(math.log10(value))
    return [m * 10.0**p for p in (power - 1, power, power + 1) for m in _MANTISSAS]


def _log2_bounds(low: float, high: float) -> tuple[float, float]:
    """Return powers of two with one to spare on either side, so that a constant is drawn in the middle."""
    return 2.0 ** (math.floor(math.log2(low)) - 1), 2.0 ** (math.ceil(math.log2(high)) + 1)


_BOUNDS = {"linear": _linear_bounds, "log10": _log10_bounds, "log2": _log2_bounds}


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    step = nice_step((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _power_ticks(low: float, high: float, base: int, count: int) -> list[float]:
    """Return about `count` whole powers; a decimal axis of less than two decades also has 2 and 5 times them."""
    first = math.ceil(math.log(low, base) - 1e-9)
    last = math.floor(math.log(high, base) + 1e-9)
    if base == 10 and high / low < 100:
        powers = [m * 10.0**p for p in range(first - 1, last + 1) for m in _MANTISSAS]
        return [value for value in powers if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    stride = max(1, math.ceil((last - first + 1) / (count + 1)))
    return [float(base) ** p for p in range(first, last + 1) if p % stride == 0]


def _log_label(value: float) -> str:
    power = math.floor(math.log10(value) + 1e-9)
    if -3 <= power <= 3:
        return f"{value:g}"
    mantissa = round(value / 10.0**power)
    return f"10{superscript(power)}" if mantissa == 1 else f"{mantissa}\u00b710{superscript(power)}"


def _linear_label(value: float, ticks: list[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    power = math.floor(math.log10(step) + 1e-9)
    if power < -4:
        return f"{round(value / 10.0**power):d}\u00b710{superscript(power)}" if round(value / step) else "0"
    return f"{value + 0.0:,.{max(0, -power)}f}" if round(value / step) else "0"
