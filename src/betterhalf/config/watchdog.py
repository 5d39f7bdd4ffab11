"""The section `[watchdog]`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import WatchdogAction


class WatchdogLevel(Section):
    """One rule: what is watched, and what happens when it leaves its bounds."""

    metric: str
    """A metric known before the update of a step: `mismatch/...`, `budget/...` or `rollout/...`."""
    below: float | None = None
    """The rule fires below this."""
    above: float | None = None
    """The rule fires above this."""
    steps: int = Field(1, ge=1)
    """Consecutive steps out of bounds before it fires."""
    action: WatchdogAction = "warn"
    """`warn`: a note. `mask`: from this step on, drop completion tokens whose proximal/behavior ratio lies outside 0.5
    to 5 (IcePop, arXiv 2510.18855). `halve_learning_rate`: once each time it fires. `stop`: before this step's update;
    the run saves and ends with exit status 3."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.below is None and self.above is None:
            raise ValueError(f"watchdog level for {self.metric} has no bound; set below or above")
        return self


class WatchdogConfig(Section):
    """Rules checked in every step, after the mismatch is measured and before anything is updated."""

    levels: tuple[WatchdogLevel, ...] = (
        WatchdogLevel(metric="budget/predicted_ess", below=0.5, action="warn"),
        WatchdogLevel(metric="mismatch/k3/mean", above=1e-2, action="warn"),
        WatchdogLevel(metric="mismatch/k3/mean", above=0.1, action="stop"),
    )
    """In order; every rule that fires acts."""
