"""Read the reply of a worker about the siblings of one prompt: their values, components and failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.tasks.worker_channel import COUNTERS
from betterhalf.types import RewardFailure

_WHOLE = ""
"""Name of the summand that holds the rewards which are not sums of components."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One reward of the siblings of a prompt."""

    values_G: list[float]
    """[G]: reward of each sibling; `error_reward` where it failed."""
    summands: list[list[float]]
    """Columns [G] that add up to `values_G`: the components, and the rewards without components."""
    components: dict[str, list[float]]
    """Values of each named component, of the siblings that have it."""
    failures: Counter[RewardFailure]
    """Number of siblings by kind of failure."""
    messages: dict[RewardFailure, str]
    """First message of each kind of failure."""


def read_reply(reply: Mapping[str, Any], count: int, error_reward: float) -> Scored:
    """Read a reply about `count` siblings; one that the user's code has forged counts as a crash."""
    try:
        return _scored(_entries(reply, count), error_reward)
    except (AttributeError, KeyError, TypeError, ValueError):
        failure = {"error": "crash", "message": "its code wrote to the worker's connection"}
        return _scored([failure] * count, error_reward)


def _entries(reply: Mapping[str, Any], count: int) -> Sequence[Mapping[str, Any]]:
    """Return one entry for each sibling."""
    if "rewards" not in reply:
        return [reply] * count
    entries: list[Mapping[str, Any]] = reply["rewards"]
    if len(entries) != count:
        raise ValueError(f"{len(entries)} rewards for {count} completions")
    return entries


def _scored(entries: Sequence[Mapping[str, Any]], error_reward: float) -> Scored:
    failures: Counter[RewardFailure] = Counter()
    messages: dict[RewardFailure, str] = {}
    components: dict[str, list[float]] = {}
    parts = []
    for entry in entries:
        if "error" in entry:
            kind: RewardFailure = entry["error"]
            if kind not in COUNTERS:
                raise ValueError(kind)
            failures[kind] += 1
            messages.setdefault(kind, str(entry["message"]))
            parts.append({_WHOLE: error_reward})
            continue
        named = {str(name): float(value) for name, value in entry["components"].items()}
        for name, value in named.items():
            components.setdefault(name, []).append(value)
        parts.append(named if entry.get("summed") else {_WHOLE: float(entry["value"])})
    columns = dict.fromkeys(name for part in parts for name in part)
    return Scored(
        values_G=[sum(part.values()) for part in parts],
        summands=[[part.get(name, 0.0) for part in parts] for name in columns],
        components=components,
        failures=failures,
        messages=messages,
    )
