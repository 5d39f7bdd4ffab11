"""Time of a step by phase: one bar for each arm, one segment for each phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from betterhalf.report.data import Arm
from betterhalf.report.drawing import PAPER_WIDTH, Drawing, Json
from betterhalf.report.marks import across, layer, layered
from betterhalf.report.markup import Figure, table

_PHASES = ("generate", "reward", "measure", "train", "sync")
_NAMES = (*_PHASES, "other")
_GAPS = {"paddingInner": 0.55, "paddingOuter": 0.5}
_PITCH = 52
"""Height of a bar with its name, in pixels."""
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


def _draw(bars: list[tuple[Arm, dict[str, float]]]) -> Drawing:
    """Return a bar for each arm, below its name and total, in segments that are labelled where there is room."""
    words = " ".join(f"{arm.name}: {_words(seconds)}." for arm, seconds in bars)
    longest = max(math.fsum(seconds.values()) for _, seconds in bars)
    return Drawing(
        key="timing",
        title="Time of a step by phase",
        description=words,
        spec=_spec(longest, len(bars)),
        tables={"bars": [_segments(arm, seconds, longest) for arm, seconds in bars]},
        names={},
    )


def _segments(arm: Arm, seconds: dict[str, float], longest: float) -> dict[str, object]:
    """Return the segments of a bar: where each begins and ends, and its label if there is room."""
    ends = list(accumulate(seconds.values()))
    share = _LETTER / PAPER_WIDTH * longest
    fits = [phase if share * (len(phase) + 1) < value else "" for phase, value in seconds.items()]
    lead = f"{arm.name}: {ends[-1]:.2f} s"
    said = [f"{value:.3f} s" for value in seconds.values()]
    begins = [0.0, *ends[:-1]]
    middles = [(begin + end) / 2 for begin, end in zip(begins, ends, strict=True)]
    places = {"a": arm.index, "bar": lead, "x": begins, "end": ends, "middle": middles}
    return places | {"phase": list(seconds), "label": fits, "seconds": said}


def _spec(longest: float, bars: int) -> Json:
    row = {"field": "bar", "type": "nominal", "sort": None, "axis": None}
    place = {"x": across("seconds", {"domain": [0, longest]}, {"grid": True}), "y": row | {"scale": _GAPS}}
    phase = {"field": "phase", "type": "nominal", "legend": None}
    fill = phase | {"scale": {"domain": list(_NAMES), "range": [f"var(--p{i})" for i in range(len(_NAMES))]}}
    ink = {"color": {"value": "var(--q)", "condition": {"test": "datum.phase == 'other'", "value": "var(--q5)"}}}
    hover = [phase | {"title": " "}, {"field": "seconds", "type": "nominal", "title": "mean"}]
    middle = {"x": place["x"] | {"field": "middle"}, "y": place["y"]}
    name = {"x": {"value": 0}, "y": place["y"], "text": {"field": "bar"}}
    layers = [
        layer("bar", "bars", place | {"x2": {"field": "end"}, "color": fill, "tooltip": hover}, stroke="var(--card)"),
        layer("text", "bars", middle | ink | {"text": {"field": "label"}}, fontWeight=600),
        layer("text", "bars", name, f"datum.phase == '{_NAMES[0]}'", align="left", dy=-21, fontWeight=600, fontSize=13),
    ]
    return layered(layers, height=_PITCH * bars)


def _words(seconds: dict[str, float]) -> str:
    return ", ".join(f"{phase} {value:.3g} s" for phase, value in seconds.items())


def _numbers(bars: list[tuple[Arm, dict[str, float]]]) -> str:
    rows = [[arm.name, *(f"{value:.3f}" for value in seconds.values())] for arm, seconds in bars]
    return table(["", *_NAMES], rows)
