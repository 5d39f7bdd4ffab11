"""The section `[watchdog]`: actions when a metric leaves its bounds."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import WatchdogAction


class WatchdogLevel(Section):
    """One rule: a metric, its bounds, and the action when it leaves them."""

    metric: str
    """Metric to watch: `mismatch/...`, `budget/...`, `experts/...` and `rollout/...` before the step's update,
    `policy/...` and `optim/...` after it."""
    below: float | None = None
    """Lower bound: the rule fires below this value."""
    above: float | None = None
    """Upper bound: the rule fires above this value."""
    steps: int = Field(1, ge=1)
    """Number of consecutive steps out of bounds before the rule fires."""
    action: WatchdogAction = "warn"
    """`warn`: show a note. `mask`: from this step on, drop completion tokens whose proximal/behavior ratio is outside
    0.5 to 5 (IcePop, arXiv 2510.18855). `halve_learning_rate`: each time the rule fires. `stop`: before this step's
    update; the run saves a checkpoint and ends with exit status 3. It cannot be used with a metric that is known only
    after the update."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.below is None and self.above is None:
            raise ValueError(f"watchdog level for {self.metric} has no bound. Set below or above.")
        return self


class WatchdogConfig(Section):
    """Rules that each step checks: those on the mismatch, the experts and the rollouts before any update, the others
    after it."""

    levels: tuple[WatchdogLevel, ...] = (
        WatchdogLevel(metric="budget/predicted_ess", below=0.5, action="warn"),
        WatchdogLevel(metric="mismatch/k3/mean", above=1e-2, action="warn"),
        WatchdogLevel(metric="mismatch/k3/mean", above=0.1, action="stop"),
        WatchdogLevel(metric="mismatch/accident_fraction", above=1e-3, action="warn"),
        WatchdogLevel(metric="experts/change_fraction/mean", above=0.05, action="warn"),
        WatchdogLevel(metric="policy/ratio/max_negative", above=50, action="warn"),
    )
    """Rules, in order; the action of every rule that fires is taken."""
