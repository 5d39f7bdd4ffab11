"""The watchdog: rules on the metrics of a step, and an action for each rule that is broken.

    warn                    a note, and a row in `watchdog.jsonl`
    mask                    from this step on, tokens with a proximal/behavior ratio outside 0.5 to 5 are dropped
    halve_learning_rate     from this step on, each time the rule fires
    stop                    the step is not trained on; the run saves a checkpoint and ends

Rules on the mismatch, the budget, the experts and the rollouts are checked before the step's update, the others after
it, when it is too late to stop: their mask or learning rate acts from the next step on.

`check` is a pure function of the rules, the state, and the step's measurements. The state is kept in the loop's
`Progress` and in the checkpoint, so that a resumed run acts like an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from betterhalf.algorithms.presets import PRESETS, Algorithm, resolve_algorithm
from betterhalf.config.schema import RunConfig, WatchdogConfig, WatchdogLevel
from betterhalf.errors import ConfigError, WatchdogError
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.run_dir import append_jsonl
from betterhalf.types import WatchdogAction

MASK = PRESETS["icepop"].correction
"""Correction that `mask` switches on: token-level proximal/behavior, dropped outside 0.5 to 5, weight kept.

Source: arXiv 2510.18855.
"""

_MEASURED = ("mismatch/", "budget/", "experts/", "rollout/")

BEFORE = frozenset(name for name in CATALOGUE if name.startswith(_MEASURED))
"""Metrics that are checked before a step's update, together with a task's own under `task/`."""

AFTER = frozenset(name for name in CATALOGUE if name.startswith(("policy/", "optim/"))) - {"optim/first_offender"}
"""Metrics that are checked after a step's update, together with a loss's own under `loss/`; the first offender is a
name, not a number."""

_DEFAULTS = WatchdogConfig().levels
"""Levels of a run that sets none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchState:
    """Counts and past actions of the watchdog."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Consecutive steps out of bounds, by `level_name`; a missing level counts 0."""
    learning_rate_factor: float = 1.0
    """Factor of the scheduled learning rate, halved each time a level with that action fires."""
    masked: bool = False
    """True once the mask is on."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values, for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_json`; missing values, as in checkpoints without a watchdog, are those of a new run."""
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Record of a level that fired: one row of `watchdog.jsonl`."""

    step: int
    metric: str
    value: float
    """Value of the metric in this step."""
    bound: float
    """Bound that the value broke."""
    action: WatchdogAction
    reason: str
    """Finding and action, in one sentence."""
    consecutive: int
    """Number of consecutive steps out of bounds, this one included."""
    fresh: bool
    """True for the first alarm of a stretch of steps, the one to show to the user."""

    @property
    def note(self) -> str:
        """Line for the user."""
        return f"step {self.step}: watchdog ({self.action}): {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Result of the check of one step."""

    state: WatchState
    """State from this step on."""
    alarms: tuple[Alarm, ...]
    """Alarms of the levels that fired, in the order of the levels."""

    @property
    def stop(self) -> Alarm | None:
        """Alarm that ends the run; None without one."""
        return next((alarm for alarm in self.alarms if alarm.action == "stop"), None)


class Stopped(WatchdogError):
    """A level with the action `stop` fired; the caller saves the run and raises an error that says where to look."""

    def __init__(self, stop: Alarm, watch: Watch, measured: Mapping[str, Any]) -> None:
        super().__init__(stop.reason)
        self.stop = stop
        """The alarm that ends the run."""
        self.watch = watch
        """All alarms of the step."""
        self.measured = measured
        """Metrics measured in the step, which is not trained on."""


def check(
    levels: Sequence[WatchdogLevel],
    state: WatchState,
    step: int,
    measured: Mapping[str, Any],
    watched: Collection[str] = BEFORE,
) -> Watch:
    """Compare the step's measurements with every level on one of the `watched` metrics; the others keep their counts.

    Raises:
        Stopped: a level with the action `stop` fired.
    """
    counts: dict[str, int] = {}
    alarms: list[Alarm] = []
    for level in levels:
        if not _is_watched(level.metric, watched):
            counts[level_name(level)] = state.counts.get(level_name(level), 0)
            continue
        # A metric that was not measured in this step is not checked.
        value = measured.get(level.metric)
        bound = None if value is None else broken_bound(level, value)
        count = 0 if bound is None else state.counts.get(level_name(level), 0) + 1
        counts[level_name(level)] = count
        # A mask that is on cannot be switched on again.
        if value is None or bound is None or count % level.steps or (level.action == "mask" and state.masked):
            continue
        state = _ACTIONS[level.action](state)
        alarms.append(_alarm(level, state, step, value, bound, count))
    watch = Watch(state=replace(state, counts=counts), alarms=tuple(alarms))
    if watch.stop:
        raise Stopped(watch.stop, watch, measured)
    return watch


def write_alarms(path: Path, alarms: Sequence[Alarm], **more: Any) -> None:
    """Add a row for each alarm to `watchdog.jsonl`, with `more` for a stop."""
    for alarm in alarms:
        append_jsonl(path, asdict(alarm) | (more if alarm.action == "stop" else {}))


def kept_after_resume(row: Mapping[str, Any], step: int) -> bool:
    """Return True for a row of `watchdog.jsonl` that a run keeps when it continues after `step`.

    Stops stay on record; other alarms are raised again when their steps are repeated.
    """
    return bool(row["action"] == "stop" or row["step"] <= step)


def _is_watched(metric: str, watched: Collection[str]) -> bool:
    return metric in watched or metric.startswith("task/" if watched is BEFORE else "loss/")


def broken_bound(level: WatchdogLevel, value: float) -> float | None:
    """Return the bound that `value` breaks, None if it is within bounds; NaN breaks every bound."""
    if level.below is not None and not value >= level.below:
        return level.below
    if level.above is not None and not value <= level.above:
        return level.above
    return None


def unmeasured(levels: Sequence[WatchdogLevel], measured: Collection[str]) -> str | None:
    """Return a note on the levels whose metrics are not among those of a step; None without such a level.

    This is known only once a run measures: many metrics belong to one kind of model, task or setting. The default
    levels cover all of them, so those that cannot fire are not mentioned.
    """
    absent = [
        f"watchdog.levels[{number}] ({level.metric})"
        for number, level in enumerate(levels)
        if level.metric not in measured and level not in _DEFAULTS
    ]
    if not absent:
        return None
    return (
        f"{', '.join(absent)} cannot fire: this run does not measure {'it' if len(absent) == 1 else 'them'}; "
        "docs/metrics.md says when a metric is measured"
    )


def level_name(level: WatchdogLevel) -> str:
    """Return the name of a level in the checkpoint; a level that a resumed run changes counts from 0 again."""
    return f"{level.metric} below {level.below} above {level.above} for {level.steps}: {level.action}"


_ACTIONS: dict[WatchdogAction, Callable[[WatchState], WatchState]] = {
    "warn": lambda state: state,
    "mask": lambda state: replace(state, masked=True),
    "halve_learning_rate": lambda state: replace(state, learning_rate_factor=state.learning_rate_factor / 2),
    "stop": lambda state: state,
}
"""Action -> function that returns the state after it."""

_WORDS: dict[WatchdogAction, str] = {
    "warn": "",
    "mask": f"; from now on tokens with a proximal/behavior ratio outside {MASK.lower:g} to {MASK.upper:g} are dropped",
    "halve_learning_rate": "; the learning rate is halved, to {factor:g} of its schedule",
    "stop": "; the run stops before this step's update",
}
"""End of an alarm's reason, by action."""


_MEANINGS = {
    "experts/change_fraction/mean": "share of tokens for which trainer and engine choose different experts",
    "mismatch/accident_fraction": "share of tokens that the trainer finds 20 times less likely than the engine did",
    "policy/ratio/max_negative": "largest current/proximal ratio with a negative advantage: not bounded by PPO's clip",
}
"""Meaning of metrics that docs/mismatch.md explains."""


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
    meaning = f" ({_MEANINGS[level.metric]}; docs/mismatch.md)" if level.metric in _MEANINGS else ""
    return f"{level.metric} is {where}{length}{meaning}{_WORDS[level.action].format(factor=state.learning_rate_factor)}"


def masked(algorithm: Algorithm) -> Algorithm:
    """Return the algorithm with the correction that `mask` switches on."""
    return replace(algorithm, correction=MASK)


def require_sound_levels(config: RunConfig) -> None:
    """Refuse levels that cannot take effect, before anything is loaded.

    Raises:
        ConfigError: a metric is unknown, or cannot be watched; a level needs more steps than the run has; `stop` is set
            for a metric that is known only after the update; or `mask` for an algorithm that does not support it, or
            has a correction already.
    """
    for number, level in enumerate(config.watchdog.levels):
        key = f"watchdog.levels[{number}]"
        require_watchable(key, level)
        if level.steps > config.training.steps:
            raise ConfigError(
                f"{key}.steps={level.steps} is more than training.steps={config.training.steps}, so the level would "
                f"never fire. Set {key}.steps={config.training.steps} or less, or leave the level out."
            )
        if level.action == "mask":
            _require_room_for_mask(key, resolve_algorithm(config.algorithm))


def require_watchable(key: str, level: WatchdogLevel) -> None:
    """Refuse a level whose metric or action cannot take effect in any run.

    Args:
        key: place of the level in the configuration.
        level: the level.

    Raises:
        ConfigError: the metric is unknown or cannot be watched, or `stop` is set for one that is known only after the
            update.
    """
    if not (_is_watched(level.metric, BEFORE) or _is_watched(level.metric, AFTER)):
        raise ConfigError(f"{key}.metric = {level.metric!r} {_why_not_watched(level.metric)}")
    if level.action == "stop" and _is_watched(level.metric, AFTER):
        raise ConfigError(
            f'{key}.action = "stop" cannot be used with {level.metric}, which is known only after the update that '
            "it would prevent. Use warn, mask or halve_learning_rate, or watch one of mismatch/*."
        )


def _why_not_watched(metric: str) -> str:
    if metric in CATALOGUE:
        return "is not watched. Choose one of mismatch/*, budget/*, experts/*, rollout/*, policy/* and optim/*."
    near = get_close_matches(metric, sorted(BEFORE | AFTER), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else "docs/metrics.md lists mismatch/*, budget/*, policy/* and others."
    return f"is not a metric that can be watched. {hint}"


def _require_room_for_mask(key: str, algorithm: Algorithm) -> None:
    if algorithm.loss is not None:
        why = "has a loss of your own, which need not read the correction"
    elif algorithm.score_centering:
        why = "has score_centering, which centres a loss without a correction"
    elif algorithm.correction.level != "none":
        why = "already has a correction for the mismatch"
    elif algorithm.surrogate.level != "none" and algorithm.surrogate.ratio == "current/behavior":
        why = "already divides by the behavior policy"
    else:
        return
    raise ConfigError(
        f'{key}.action = "mask" cannot be used with algorithm.preset={algorithm.preset}, which {why}. Use '
        "algorithm=grpo, where the mask can be switched on, or algorithm=icepop, which masks from the first step, or "
        "another action."
    )
