"""The watchdog of a TRL run: the rules of betterhalf's own runs, with the actions that leave TRL's numbers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from betterhalf.config.load import configuration_of
from betterhalf.config.schema import WatchdogLevel
from betterhalf.config.watchdog import WatchdogConfig
from betterhalf.errors import ConfigError
from betterhalf.runs import watchdog
from betterhalf.runs.watchdog import Alarm, Stopped, WatchState

DEFAULT = tuple(
    level.model_copy(update={"action": "warn"})
    for level in WatchdogConfig().levels
    if level.metric.startswith(("mismatch/", "budget/"))
)
"""betterhalf's default rules on the mismatch and the budget, each with the action `warn`."""

_ACTIONS = ("warn", "stop")


def checked_levels(levels: Iterable[WatchdogLevel | Mapping[str, Any]] | None) -> tuple[WatchdogLevel, ...]:
    """Return the rules of a callback: its own, or the default for None.

    Raises:
        ConfigError: a rule is malformed, can never take effect, or has an action that changes TRL's loss.
    """
    if levels is None:
        return DEFAULT
    tables = [level.model_dump() if isinstance(level, WatchdogLevel) else dict(level) for level in levels]
    found = configuration_of({"watchdog": {"levels": tables}}).watchdog.levels
    for number, level in enumerate(found):
        key = f"watchdog.levels[{number}]"
        watchdog.require_watchable(key, level)
        if level.action not in _ACTIONS:
            raise ConfigError(
                f'{key}.action = "{level.action}" changes the loss or the learning rate, which are TRL\'s. Use warn or '
                "stop; GRPOConfig(vllm_importance_sampling_correction=True) masks or truncates in TRL."
            )
    return found


class Alarms:
    """State of the watchdog over the steps of a run."""

    def __init__(self, levels: Sequence[WatchdogLevel]) -> None:
        """Check `levels` in each step."""
        self.levels = tuple(levels)
        self._state = WatchState()

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Restore the state from the rows of `metrics.jsonl`, whose steps a resumed training does not repeat."""
        self._state = WatchState()
        for row in rows:
            try:
                self.before(row["step"], row)
                self.after(row["step"], row)
            except Stopped as stopped:  # the rule is newer than the row
                self._state = stopped.watch.state

    def before(self, step: int, measured: Mapping[str, Any]) -> tuple[Alarm, ...]:
        """Check the metrics that are known before the step's update, and return the alarms.

        Raises:
            Stopped: a rule with the action `stop` fired.
        """
        return self._check(step, measured, watchdog.BEFORE)

    def after(self, step: int, measured: Mapping[str, Any]) -> tuple[Alarm, ...]:
        """Check the metrics that are known after the step's update, and return the alarms."""
        return self._check(step, measured, watchdog.AFTER)

    def _check(self, step: int, measured: Mapping[str, Any], watched: frozenset[str]) -> tuple[Alarm, ...]:
        watch = watchdog.check(self.levels, self._state, step, measured, watched)
        self._state = watch.state
        return watch.alarms
