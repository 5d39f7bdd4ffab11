"""Rules of the watchdog: when they fire, what they change, and which are refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from betterhalf.algorithms.presets import PRESETS, resolve_algorithm
from betterhalf.config.schema import AlgorithmConfig, RunConfig, WatchdogConfig, WatchdogLevel
from betterhalf.errors import ConfigError
from betterhalf.runs.watchdog import WATCHED, Stopped, Watch, WatchState, check, masked, require_sound_levels

K3 = "mismatch/k3/mean"


def level(**choices: Any) -> WatchdogLevel:
    return WatchdogLevel(**({"metric": K3, "above": 0.1} | choices))


def run(levels: list[WatchdogLevel], values: list[float], state: WatchState | None = None) -> list[Watch]:
    """Run consecutive checks, each with the state of the one before."""
    state, found = state or WatchState(), []
    for step, value in enumerate(values, start=1):
        found.append(check(levels, state, step, {K3: value}))
        state = found[-1].state
    return found


def config(*levels: WatchdogLevel, **algorithm: Any) -> RunConfig:
    return RunConfig(watchdog=WatchdogConfig(levels=levels), algorithm=AlgorithmConfig(**algorithm))


@pytest.mark.parametrize(
    ("bounds", "value", "bound"),
    [
        ({"above": 0.1}, 0.2, 0.1),
        ({"above": 0.1}, 0.1, None),
        ({"above": None, "below": 0.5}, 0.4, 0.5),
        ({"above": None, "below": 0.5}, 0.5, None),
        ({"above": 0.5, "below": 0.1}, 0.05, 0.1),
        ({"above": 0.5, "below": 0.1}, 0.6, 0.5),
        ({"above": 0.1}, math.inf, 0.1),
        ({"above": 0.1}, math.nan, 0.1),
        ({"above": None, "below": 0.5}, math.nan, 0.5),
    ],
)
def test_a_level_fires_outside_its_bounds_only(bounds: dict[str, Any], value: float, bound: float | None) -> None:
    (watch,) = run([level(**bounds)], [value])
    assert [alarm.bound for alarm in watch.alarms] == ([] if bound is None else [bound])


def test_consecutive_steps_are_counted_and_a_good_one_resets_the_count() -> None:
    fired = run([level(steps=2)], [1, 1, 1, 1, 0, 1, 1])
    assert [len(watch.alarms) for watch in fired] == [0, 1, 0, 1, 0, 0, 1]
    alarms = [alarm for watch in fired for alarm in watch.alarms]
    assert [(alarm.step, alarm.consecutive, alarm.fresh) for alarm in alarms] == [
        (2, 2, True),
        (4, 4, False),
        (7, 2, True),
    ]


def test_an_alarm_says_what_was_seen_and_what_is_done() -> None:
    (watch,) = run([level(action="halve_learning_rate")], [0.25])
    (alarm,) = watch.alarms
    assert (alarm.step, alarm.metric, alarm.value, alarm.bound) == (1, K3, 0.25, 0.1)
    assert alarm.reason == "mismatch/k3/mean is 0.25, above 0.1; the learning rate is halved, to 0.5 of its schedule"
    (alarm,) = run([level(above=None, below=0.5, steps=2)], [0.25, 0.3])[-1].alarms
    assert alarm.reason == "mismatch/k3/mean is 0.3, below 0.5 for 2 steps in a row"
    (alarm,) = run([level()], [math.nan])[0].alarms
    assert alarm.reason == "mismatch/k3/mean is not a number"


def test_the_learning_rate_is_halved_each_time() -> None:
    factors = [watch.state.learning_rate_factor for watch in run([level(action="halve_learning_rate")], [1, 0, 1, 1])]
    assert factors == [0.5, 0.5, 0.25, 0.125]


def test_the_mask_stays_on_and_is_announced_once() -> None:
    watches = run([level(action="mask")], [0, 1, 1, 0])
    assert [watch.state.masked for watch in watches] == [False, True, True, True]
    assert [len(watch.alarms) for watch in watches] == [0, 1, 0, 0]


def test_the_mask_is_that_of_icepop_and_nothing_else_changes() -> None:
    assert masked(PRESETS["grpo"]).correction == PRESETS["icepop"].correction
    assert masked(PRESETS["gspo"]).surrogate == PRESETS["gspo"].surrogate


def test_stop_ends_the_step_with_every_alarm_and_the_measurements() -> None:
    with pytest.raises(Stopped, match="the run stops before this step's update") as caught:
        run([level(), level(above=0.5, action="stop")], [0.2, 0.9])
    assert caught.value.stop.step == 2
    assert [alarm.action for alarm in caught.value.watch.alarms] == ["warn", "stop"]
    assert caught.value.measured == {K3: 0.9}


def test_levels_count_apart_and_a_changed_level_counts_from_zero() -> None:
    state = run([level(steps=3), level(above=0.5, steps=3)], [0.2, 0.9])[-1].state
    assert sorted(state.counts.values()) == [1, 2]
    (watch,) = run([level(above=0.15, steps=3), level(steps=3)], [0.9], state)
    assert sorted(watch.state.counts.values()) == [1, 3]
    assert [alarm.bound for alarm in watch.alarms] == [0.1]


def test_the_state_survives_json_and_its_absence() -> None:
    state = run([level(steps=2), level(action="mask"), level(action="halve_learning_rate")], [1])[-1].state
    assert WatchState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert WatchState.from_json({}) == WatchState()


def test_what_was_not_measured_is_not_judged() -> None:
    watch = check([level(steps=2)], run([level(steps=2)], [1])[0].state, 2, {K3: None})
    assert watch.alarms == () and list(watch.state.counts.values()) == [0]


def test_without_levels_nothing_is_watched() -> None:
    assert run([], [math.nan])[0].alarms == ()


def test_the_default_levels_are_sound_for_every_preset() -> None:
    assert {level.metric for level in RunConfig().watchdog.levels} <= set(WATCHED)
    for preset in PRESETS:
        require_sound_levels(RunConfig(algorithm=AlgorithmConfig(preset=preset)))


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("mismatch/k3/meen", "Did you mean 'mismatch/k3/mean'?"),
        ("budget/predicted_es", "Did you mean 'budget/predicted_ess'?"),
        ("policy/entropy/mean", "is not watched before the update"),
        ("zzz", "docs/metrics.md lists"),
    ],
)
def test_metrics_that_cannot_be_watched_are_refused_with_their_place(metric: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_sound_levels(config(level(), level(metric=metric)))
    assert "watchdog.levels[1].metric" in str(caught.value) and words in str(caught.value)


def test_what_is_watched_is_known_before_the_update() -> None:
    assert {name.partition("/")[0] for name in WATCHED} == {"mismatch", "budget", "rollout"}


@pytest.mark.parametrize("preset", ["pg_seq_is", "pg_seq_mis", "dppo_tv", "icepop", "grpo_token_tis"])
def test_a_mask_is_refused_where_there_is_no_place_for_one(preset: str) -> None:
    with pytest.raises(ConfigError, match=r"levels\[0\].action = .mask. cannot be used with .*algorithm=grpo"):
        require_sound_levels(config(level(action="mask"), preset=preset))


@pytest.mark.parametrize("preset", ["grpo", "gspo", "reinforce", "cispo", "dapo"])
def test_a_mask_is_accepted_where_there_is_a_place(preset: str) -> None:
    settings = config(level(action="mask"), preset=preset)
    require_sound_levels(settings)
    correction = masked(resolve_algorithm(settings.algorithm)).correction
    assert (correction.treatment, correction.lower, correction.upper) == ("mask", 0.5, 5.0)
