"""Time of a step by phase: one bar for each arm, one segment for each phase."""

from __future__ import annotations

import math
from collections.abc import Sequence

from betterhalf.report.data import Arm
from betterhalf.report.drawing import Drawing, Json
from betterhalf.report.marks import layer, layered
from betterhalf.report.markup import Figure, table

_PHASES = ("generate", "reward", "measure", "train", "sync")
_NAMES = (*_PHASES, "other")
_GAPS = {"paddingInner": 0.55, "paddingOuter": 0.5}
_PITCH = 52
"""Height of a bar with its name, in pixels."""
_LETTER = 7.2 / 330
"""Upper estimate of the width of a letter, as a share of the width of a figure on the page."""
_AXIS = {"grid": True, "tickCount": 5}


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
    room = max(math.fsum(seconds.values()) for _, seconds in bars) * _LETTER
    return Drawing(
        key="timing",
        title="Time of a step by phase",
        description=" ".join(f"{arm.name}: {_words(seconds)}." for arm, seconds in bars),
        spec=_spec(len(bars)),
        tables={"bars": [_segments(arm, seconds, room) for arm, seconds in bars]},
    )


def _segments(arm: Arm, seconds: dict[str, float], room: float) -> dict[str, object]:
    """Return the columns of a bar; `room` is the length of a letter in seconds."""
    fits = [phase if room * (len(phase) + 1) < value else "" for phase, value in seconds.items()]
    bar = f"{arm.name}: {math.fsum(seconds.values()):.2f} s"
    columns = {"n": list(range(len(seconds))), "phase": list(seconds), "label": fits}
    return {"a": arm.index, "bar": bar, **columns, "seconds": list(seconds.values())}


def _spec(bars: int) -> Json:
    """Return bars with the name of each above it, and the names of segments."""
    name = {"labelAlign": "left", "labelPadding": 0, "labelOffset": -22, "labelLimit": 0, "labelFontWeight": 600}
    place: Json = {
        "x": {"field": "seconds", "type": "quantitative", "stack": "zero", "scale": {"nice": False}, "axis": _AXIS},
        "y": {"field": "bar", "type": "nominal", "sort": None, "scale": _GAPS, "title": "", "axis": name},
        "order": {"field": "n"},
    }
    fill = {"domain": list(_NAMES), "range": [f"var(--p{place})" for place in range(len(_NAMES))]}
    hover = {"value": {"expr": "datum.phase + ': mean ' + format(datum.seconds, '.3f') + ' s'"}}
    color = {"field": "phase", "type": "nominal", "legend": None, "scale": fill}
    ink = {"value": "var(--q)", "condition": {"test": "datum.phase == 'other'", "value": "var(--q5)"}}
    middle = {"x": place["x"] | {"bandPosition": 0.5}, "detail": {"field": "phase"}}
    layers = [
        layer("bar", "bars", {"color": color, "tooltip": hover}, stroke="var(--card)"),
        layer("text", "bars", middle | {"text": {"field": "label"}, "color": ink}, fontWeight=600),
    ]
    return layered(place, layers, height=_PITCH * bars)


def _words(seconds: dict[str, float]) -> str:
    return ", ".join(f"{phase} {value:.3g} s" for phase, value in seconds.items())


def _numbers(bars: list[tuple[Arm, dict[str, float]]]) -> str:
    rows = [[arm.name, *(f"{value:.3f}" for value in seconds.values())] for arm, seconds in bars]
    return table(["", *_NAMES], rows)
