"""Time of a step by phase: one bar for each arm, one segment for each phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from betterhalf.report.axis import Axis, fit
from betterhalf.report.canvas import svg
from betterhalf.report.data import Arm
from betterhalf.report.markup import Figure, table

_PHASES = ("generate", "reward", "measure", "train", "sync")
_NAMES = (*_PHASES, "other")
_LEFT, _RIGHT = 12, 428
_BAR, _PITCH = 24, 52
_LETTER = 7.2
"""Upper estimate of the width of a letter in pixels."""


def timing_figure(arms: Sequence[Arm]) -> Figure | None:
    """Draw the mean seconds of a step by phase; None if no arm recorded times."""
    bars = [(arm, seconds) for arm in arms if (seconds := phase_seconds(arm))]
    if not bars:
        return None
    return Figure(
        key="timing",
        title="Time of a step",
        unit="mean seconds by phase",
        image=_draw(bars),
        caption="Segments in the order of a step: "
        + ", ".join(_NAMES)
        + ". The third segment measures the mismatch. Arms should differ little on hardware that is equally fast in "
        "both formats.",
        numbers=_numbers(bars),
    )


def phase_seconds(arm: Arm) -> dict[str, float]:
    """Return the mean seconds of each phase in step order, and the rest of the step as `other`; empty without times."""
    seconds = {phase: _mean(arm.finite(f"time/{phase}_seconds")) for phase in _PHASES}
    total = _mean(arm.finite("time/step_seconds"))
    known = math.fsum(seconds.values())
    if known == 0 and total == 0:
        return {}
    return {**seconds, "other": max(0.0, total - known)}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _draw(bars: list[tuple[Arm, dict[str, float]]]) -> str:
    totals = [math.fsum(seconds.values()) for _, seconds in bars]
    axis = fit(totals, scale="linear", start=_LEFT, end=_RIGHT, include=(0.0,))
    assert axis is not None  # totals are finite and there is at least one
    bottom = 14 + _PITCH * len(bars)
    parts = [_axis(axis, bottom)]
    for row, (arm, seconds) in enumerate(bars):
        parts.append(_bar(arm, seconds, 30 + row * _PITCH, axis))
    words = " ".join(f"{arm.name}: {_words(seconds)}." for arm, seconds in bars)
    return svg("timing", "Time of a step by phase", words, "".join(parts), height=bottom + 26)


def _axis(axis: Axis, bottom: int) -> str:
    parts = []
    for tick in axis.ticks():
        x = axis.pixel(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{axis.label(tick)}</text>')
    return "".join(parts)


def _bar(arm: Arm, seconds: dict[str, float], y: int, axis: Axis) -> str:
    total = math.fsum(seconds.values())
    parts = [f'<text class="barname" x="{_LEFT}" y="{y - 6}">{escape(arm.name)}: {total:.2f} s</text>']
    begun = 0.0
    for index, (phase, value) in enumerate(seconds.items()):
        left, right = axis.pixel(begun), axis.pixel(begun + value)
        begun += value
        width = right - left - 1
        if width <= 0:
            continue
        parts.append(
            f'<rect class="p{index}" x="{left:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}">'
            f"<title>{phase}: {value:.3f} s</title></rect>"
        )
        if width > _LETTER * len(phase) + 6:
            middle = (left + right) / 2
            parts.append(f'<text class="q{index}" x="{middle:.1f}" y="{y + 16}" text-anchor="middle">{phase}</text>')
    return "".join(parts)


def _words(seconds: dict[str, float]) -> str:
    return ", ".join(f"{phase} {value:.3g} s" for phase, value in seconds.items())


def _numbers(bars: list[tuple[Arm, dict[str, float]]]) -> str:
    rows = [[arm.name, *(f"{value:.3f}" for value in seconds.values())] for arm, seconds in bars]
    return table(["", *_NAMES], rows)
