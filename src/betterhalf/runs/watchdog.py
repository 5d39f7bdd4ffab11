"""The watchdog: rules on what is known before a step's update, and what is done when one is broken.

    warn                    a note, and a row in `watchdog.jsonl`
    mask                    from this step on, tokens whose proximal/behavior ratio leaves 0.5 to 5 are dropped
    halve_learning_rate     from this step on, each time the rule fires
    stop                    nothing of this step is learned; the run saves and ends

`check` is a pure function of the rules, the state, and the step's measurements. The state travels in the loop's
`Progress` and in the checkpoint, so that a resumed run acts as an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Self

from betterhalf.algorithms.presets import PRESETS, Algorithm, resolve_algorithm
from betterhalf.config.schema import RunConfig, WatchdogLevel
from betterhalf.errors import ConfigError, WatchdogError
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.types import WatchdogAction

MASK = PRESETS["icepop"].correction
"""What `mask` switches on: token-level proximal/behavior, dropped outside 0.5 to 5, weight kept (arXiv 2510.18855)."""

WATCHED = tuple(name for name in CATALOGUE if name.startswith(("mismatch/", "budget/", "rollout/")))
"""Metrics known before a step's update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchState:
    """What the watchdog has done and counted so far."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Consecutive steps out of bounds, by `level_name`; a level that is not named counts 0."""
    learning_rate_factor: float = 1.0
    """Multiplies the scheduled learning rate: 0.5 for each time a level halved it."""
    masked: bool = False
    """Whether the mask is on."""

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; what is missing, as in checkpoints without a watchdog, is as in a new run."""
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A level that fired: one row of `watchdog.jsonl`."""

    step: int
    metric: str
    value: float
    """Of this step."""
    bound: float
    """The bound it broke."""
    action: WatchdogAction
    reason: str
    """What was seen and what is done about it, in one sentence."""
    consecutive: int
    """Steps in a row out of bounds, this one included."""
    fresh: bool
    """The first alarm of a stretch: what a person should be told once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What the check of one step found."""

    state: WatchState
    """As it is from this step on."""
    alarms: tuple[Alarm, ...]
    """Levels that fired, in their order."""

    @property
    def stop(self) -> Alarm | None:
        """The alarm that ends the run, if any."""
        return next((alarm for alarm in self.alarms if alarm.action == "stop"), None)


class Stopped(WatchdogError):
    """A level with the action `stop` fired; whoever keeps the run folder saves, says where to look, and raises on."""

    def __init__(self, stop: Alarm, watch: Watch, measured: Mapping[str, Any]) -> None:
        super().__init__(stop.reason)
        self.stop = stop
        """The alarm that ends the run."""
        self.watch = watch
        """All alarms of the step."""
        self.measured = measured
        """What was measured of the step that is not learned."""


def check(levels: Sequence[WatchdogLevel], state: WatchState, step: int, measured: Mapping[str, Any]) -> Watch:
    """Compare the step's measurements with every level, before anything is updated.

    Raises:
        Stopped: a level with the action `stop` fired.
    """
    counts: dict[str, int] = {}
    alarms: list[Alarm] = []
    for level in levels:
        # What an engine did not measure in this step is not judged.
        value = measured.get(level.metric)
        bound = None if value is None else broken_bound(level, value)
        count = 0 if bound is None else state.counts.get(level_name(level), 0) + 1
        counts[level_name(level)] = count
        # A mask that is on has nothing more to switch on.
        if value is None or bound is None or count % level.steps or (level.action == "mask" and state.masked):
            continue
        state = _ACTIONS[level.action](state)
        alarms.append(_alarm(level, state, step, value, bound, count))
    watch = Watch(state=replace(state, counts=counts), alarms=tuple(alarms))
    if watch.stop:
        raise Stopped(watch.stop, watch, measured)
    return watch


def broken_bound(level: WatchdogLevel, value: float) -> float | None:
    """The bound that `value` breaks; None when it is within. A value that is not a number breaks any bound."""
    if level.below is not None and not value >= level.below:
        return level.below
    if level.above is not None and not value <= level.above:
        return level.above
    return None


def level_name(level: WatchdogLevel) -> str:
    """Identifies a level in the checkpoint: levels that a resumed run changes start to count anew."""
    return f"{level.metric} below {level.below} above {level.above} for {level.steps}: {level.action}"


_ACTIONS: dict[WatchdogAction, Callable[[WatchState], WatchState]] = {
    "warn": lambda state: state,
    "mask": lambda state: replace(state, masked=True),
    "halve_learning_rate": lambda state: replace(state, learning_rate_factor=state.learning_rate_factor / 2),
    "stop": lambda state: state,
}
"""What each action changes."""

_WORDS: dict[WatchdogAction, str] = {
    "warn": "",
    "mask": f"; from now on tokens with a proximal/behavior ratio outside {MASK.lower:g} to {MASK.upper:g} are dropped",
    "halve_learning_rate": "; the learning rate is halved, to {factor:g} of its schedule",
    "stop": "; the run stops before this step's update",
}
"""What each action says."""


def _alarm(level: WatchdogLevel, state: WatchState, step: int, value: float, bound: float, consecutive: int) -> Alarm:
    return Alarm(
        step=step,
        metric=level.metric,
        value=value,
        bound=bound,
        action=level.action,
        reason=_reason(level, state, value, bound, consecutive),
        consecutive=consecutive,
        fresh=consecutive == level.steps,
    )


def _reason(level: WatchdogLevel, state: WatchState, value: float, bound: float, consecutive: int) -> str:
    side = "below" if bound == level.below else "above"
    where = "not a number" if math.isnan(value) else f"{value:.3g}, {side} {bound:g}"
    length = f" for {consecutive} steps in a row" if consecutive > 1 else ""
    return f"{level.metric} is {where}{length}{_WORDS[level.action].format(factor=state.learning_rate_factor)}"


def masked(algorithm: Algorithm) -> Algorithm:
    """The algorithm with the correction that `mask` switches on."""
    return replace(algorithm, correction=MASK)


def require_sound_levels(config: RunConfig) -> None:
    """Refuse, before anything is loaded, levels that could not act.

    Raises:
        ConfigError: a metric that is unknown, or not known before the update; a mask for an algorithm that has no
            place for one, or has one already.
    """
    for number, level in enumerate(config.watchdog.levels):
        key = f"watchdog.levels[{number}]"
        if level.metric not in WATCHED:
            raise ConfigError(f"{key}.metric = {level.metric!r} {_why_not_watched(level.metric)}")
        if level.action == "mask":
            _require_room_for_mask(key, resolve_algorithm(config.algorithm))


def _why_not_watched(metric: str) -> str:
    if metric in CATALOGUE:
        return "is not watched before the update. Choose one of mismatch/*, budget/* and rollout/*."
    near = get_close_matches(metric, WATCHED, n=1, cutoff=0.5)
    cure = f"Did you mean {near[0]!r}?" if near else "docs/metrics.md lists mismatch/*, budget/* and rollout/*."
    return f"is no metric that can be watched. {cure}"


def _require_room_for_mask(key: str, algorithm: Algorithm) -> None:
    if algorithm.correction.level != "none":
        why = "already has a correction for the mismatch"
    elif algorithm.surrogate.level != "none" and algorithm.surrogate.ratio == "current/behavior":
        why = "already divides by the behavior policy"
    else:
        return
    raise ConfigError(
        f'{key}.action = "mask" has no place in algorithm.preset={algorithm.preset}, which {why}. Use '
        "algorithm=grpo, where the mask can be switched on, or algorithm=icepop, which masks from the first step, or "
        "another action."
    )
