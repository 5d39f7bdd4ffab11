"""Events of a run: actions of the watchdog, and restarts of engines and of the trainer's ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from betterhalf.report.chart import Mark
from betterhalf.report.data import Arm
from betterhalf.report.fields import mapping, mappings, number
from betterhalf.report.markup import shown, table

RESTARTS = {
    "rollout/engine_restarts": (
        "engine restarted",
        "the engine process ended; a new one loaded the current weights, and the step continued",
    ),
    "optim/rank_restarts": (
        "ranks restarted",
        "a rank ended; all started again, and repeated the steps since the last checkpoint",
    ),
}
"""Metric that counts restarts -> (action, reason) of the event."""
_FALLBACK = "mismatch/k3/mean"
"""Metric whose figure also marks the events of metrics without a figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event, or the same event on consecutive steps."""

    first: int
    """First step."""
    last: int
    """Last step."""
    metric: str
    action: str
    value: float
    """Value of the metric at the first step."""
    bound: float
    """Bound that the value crossed; NaN without one."""
    reason: str


def events_of(arm: Arm) -> list[Event]:
    """Return the watchdog's events and restarts, in step order; repetitions are merged."""
    rows = sorted([*_watchdog(arm), *_restarts(arm)], key=lambda event: event.first)
    merged: list[Event] = []
    for event in rows:
        index = next((i for i, old in enumerate(merged) if _continues(old, event)), None)
        if index is None:
            merged.append(event)
        else:
            merged[index] = _extended(merged[index], event)
    return merged


def event_marks(arm: Arm, metrics: Sequence[str], all_metrics: Sequence[str]) -> tuple[Mark, ...]:
    """Return flags for the events of the `metrics` that a figure shows.

    The mismatch figure also gets the events of metrics that no figure shows (those not in `all_metrics`).
    """
    return tuple(
        Mark(step=event.first, text=f"{arm.name}, {_steps(event)}: {event.action}, {event.metric}", flag=True)
        for event in events_of(arm)
        if event.metric in metrics or (event.metric not in all_metrics and _FALLBACK in metrics)
    )


def events_table(arms: Sequence[Arm]) -> str:
    """Return all events as a table; empty without events."""
    rows = [_row(arm, event) for arm in arms for event in events_of(arm)]
    head = ["run", "step", "action", "metric", "value", "bound", "reason"]
    return table(head, rows, numeric=False) if rows else ""


def watchdog_bounds(arm: Arm, metrics: Sequence[str]) -> list[tuple[float, str]]:
    """Return the bounds that the run's configuration sets on any of `metrics`, with the action that each triggers."""
    levels = [level for level in mappings(mapping(arm.config, "watchdog"), "levels") if level.get("metric") in metrics]
    bounds = [(number(level.get(side)), str(level.get("action"))) for level in levels for side in ("below", "above")]
    return [(value, f"watchdog: {action}") for value, action in bounds if math.isfinite(value)]


def _watchdog(arm: Arm) -> list[Event]:
    return [
        Event(
            first=int(step),
            last=int(step),
            metric=str(row.get("metric") or "?"),
            action=str(row.get("action") or "?"),
            value=number(row.get("value")),
            bound=number(row.get("bound")),
            reason=str(row.get("reason") or ""),
        )
        for row in arm.watchdog
        if math.isfinite(step := number(row.get("step")))
    ]


def _restarts(arm: Arm) -> list[Event]:
    return [
        Event(first=step, last=step, metric=metric, action=action, value=count, bound=math.nan, reason=reason)
        for metric, (action, reason) in RESTARTS.items()
        if any(arm.values(metric))
        for step, count in zip(arm.steps, arm.values(metric), strict=True)
        if count > 0
    ]


def _continues(old: Event, new: Event) -> bool:
    same = (old.metric, old.action, old.bound) == (new.metric, new.action, new.bound)
    return same and new.first - old.last <= 1


def _extended(old: Event, new: Event) -> Event:
    return Event(
        first=old.first,
        last=new.last,
        metric=old.metric,
        action=old.action,
        value=old.value,
        bound=old.bound,
        reason=old.reason,
    )


def _row(arm: Arm, event: Event) -> list[str]:
    numbers = [shown(event.value, ".4g"), shown(event.bound, ".4g")]
    return [arm.name, _steps(event).removeprefix("step "), event.action, event.metric, *numbers, event.reason]


def _steps(event: Event) -> str:
    return f"step {event.first}" if event.first == event.last else f"step {event.first} to {event.last}"
