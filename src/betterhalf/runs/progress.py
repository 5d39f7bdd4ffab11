"""Position of a run between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from betterhalf.runs.watchdog import WatchState


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Everything that the next step depends on, apart from the trainer's state."""

    step: int = 0
    """Last finished step."""
    position: int = 0
    """Number of prompts consumed."""
    policy_version: int = 0
    """Number of applied updates in the trainer's weights."""
    watch: WatchState = field(default_factory=WatchState)
    """Counts and actions of the watchdog."""
