"""Rules of the watchdog: when they fire, what they change, and which are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from betterhalf.algorithms.loss_stats import policy_metrics
from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import PRESETS, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs
from betterhalf.config.schema import AlgorithmConfig, RunConfig, TrainingConfig, WatchdogConfig, WatchdogLevel
from betterhalf.diagnostics.logprob_gap import mismatch_metrics
from betterhalf.errors import ConfigError
from betterhalf.runs.watchdog import (
    AFTER,
    BEFORE,
    Stopped,
    Watch,
    WatchState,
    check,
    masked,
    require_sound_levels,
    unmeasured,
)

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


def test_changed_experts_are_checked_before_the_update_and_warn_by_default() -> None:
    name = "experts/change_fraction/mean"
    assert name in BEFORE
    levels = WatchdogConfig().levels
    assert not check(levels, WatchState(), 1, {name: 0.05}).alarms
    (alarm,) = check(levels, WatchState(), 1, {name: 0.06}).alarms
    assert (alarm.metric, alarm.action, alarm.bound) == (name, "warn", 0.05)
    assert "choose different experts" in alarm.reason


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
    assert {level.metric for level in RunConfig().watchdog.levels} <= BEFORE | AFTER
    for preset in PRESETS:
        require_sound_levels(RunConfig(algorithm=AlgorithmConfig(preset=preset)))


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("mismatch/k3/meen", "Did you mean 'mismatch/k3/mean'?"),
        ("budget/predicted_es", "Did you mean 'budget/predicted_ess'?"),
        ("policy/ratio/max_negativ", "Did you mean 'policy/ratio/max_negative'?"),
        ("time/step_seconds", "is not watched. Choose one of mismatch/*"),
        ("optim/first_offender", "is not watched. Choose one of mismatch/*"),
        ("zzz", "docs/metrics.md lists"),
    ],
)
def test_metrics_that_cannot_be_watched_are_refused_with_their_place(metric: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_sound_levels(config(level(), level(metric=metric)))
    assert "watchdog.levels[1].metric" in str(caught.value) and words in str(caught.value)


def test_what_is_watched_before_the_update_and_after_it() -> None:
    assert {name.partition("/")[0] for name in BEFORE} == {"mismatch", "budget", "experts", "rollout"}
    assert {name.partition("/")[0] for name in AFTER} == {"policy", "optim"}


def test_a_task_s_own_metrics_are_watched_before_the_update() -> None:
    own = level(metric="task/score/mean", above=None, below=0.5)
    require_sound_levels(config(own, level(metric="task/errors", above=3, action="stop")))
    watch = check([own], WatchState(), 1, {"task/score/mean": 0.25})
    assert [(alarm.metric, alarm.value) for alarm in watch.alarms] == [("task/score/mean", 0.25)]
    assert check([own], watch.state, 1, {"task/score/mean": 0.25}, AFTER).alarms == ()
    assert check([own], WatchState(), 1, {}).alarms == ()  # a task of another type does not measure it


def test_metrics_of_a_loss_are_watched_after_the_update() -> None:
    own = level(metric="loss/clipped", above=0.5)
    require_sound_levels(config(own))
    assert check([own], WatchState(), 1, {"loss/clipped": 0.75}).alarms == ()
    (alarm,) = check([own], WatchState(), 1, {"loss/clipped": 0.75}, AFTER).alarms
    assert (alarm.metric, alarm.value, alarm.bound) == ("loss/clipped", 0.75, 0.5)
    with pytest.raises(ConfigError, match="is known only after the update"):
        require_sound_levels(config(level(metric="loss/clipped", above=0.5, action="stop")))


RATIO = "policy/ratio/max_negative"


def whole_step(levels: Sequence[WatchdogLevel], state: WatchState, step: int, measured: dict[str, float]) -> Watch:
    """Check a step before its update and after it, as the loop does."""
    before = check(levels, state, step, {name: value for name, value in measured.items() if name in BEFORE})
    after = check(levels, before.state, step, measured, AFTER)
    return Watch(state=after.state, alarms=before.alarms + after.alarms)


def test_each_check_of_a_step_leaves_the_counts_of_the_other_alone() -> None:
    levels = [level(steps=2), level(metric=RATIO, above=50, steps=3)]
    state, fired = WatchState(), []
    for step, (k3, ratio) in enumerate([(1, 90), (1, 90), (0, 90), (1, 1), (1, 90)], start=1):
        watch = whole_step(levels, state, step, {K3: k3, RATIO: ratio})
        state = watch.state
        fired.append([alarm.metric for alarm in watch.alarms])
    assert fired == [[], [K3], [RATIO], [], [K3]]
    assert list(state.counts.values()) == [2, 1]


def test_mask_and_learning_rate_of_the_late_check_act_from_the_next_step_on() -> None:
    levels = [level(metric=RATIO, above=50, action=action) for action in ("mask", "halve_learning_rate")]
    require_sound_levels(config(*levels))
    state = whole_step(levels, WatchState(), 1, {K3: 0.0, RATIO: 60.0}).state
    assert state.masked and state.learning_rate_factor == 0.5


def test_a_stop_after_the_update_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"levels\[0\].action = .stop. cannot be used with {RATIO}.*Use warn"):
        require_sound_levels(config(level(metric=RATIO, action="stop")))


def test_a_level_that_needs_more_steps_than_the_run_has_is_refused() -> None:
    short = config(level(), level(steps=20)).model_copy(update={"training": TrainingConfig(steps=10)})
    with pytest.raises(ConfigError, match=r"levels\[1\].steps=20 is more than training.steps=10.*steps=10 or less"):
        require_sound_levels(short)
    require_sound_levels(short.model_copy(update={"training": TrainingConfig(steps=20)}))


def test_levels_on_metrics_that_the_run_does_not_measure_are_named() -> None:
    levels = [level(), level(metric="staleness/k3/mean"), level(metric="task/turns/mean")]
    assert unmeasured(levels[:1], {K3: None}) is None, "a metric may have no value in one step"
    assert unmeasured(levels[:2], {K3: 0.0}) == (
        "watchdog.levels[1] (staleness/k3/mean) cannot fire: this run does not measure it; docs/metrics.md says when a "
        "metric is measured"
    )
    assert unmeasured(RunConfig().watchdog.levels, {K3: 0.0}) is None, "nobody asked for the default levels"
    assert "levels[1] (staleness/k3/mean), watchdog.levels[2] (task/turns/mean) cannot" in str(unmeasured(levels, [K3]))


def defaults(changes: dict[str, float]) -> list[str]:
    """Return the metrics on which the default levels fire in a step that is healthy but for these values."""
    healthy = {"budget/predicted_ess": 0.99, K3: 1e-3, "mismatch/accident_fraction": 2e-6, RATIO: 33.0}
    share = {"optim/token_share/max": 1.0, "optim/grad_norm": 0.3}
    values = healthy | share | changes
    return [alarm.metric for alarm in whole_step(RunConfig().watchdog.levels, WatchState(), 1, values).alarms]


def test_the_default_levels_warn_of_a_collapse_and_not_of_a_healthy_step() -> None:
    # Constructed from log-ratios: of 1,000 tokens, two that the trainer finds e^8 times less likely; one comes back.
    trainer = torch.full((1000,), -0.5)
    trainer[[3, 900]] -= 8
    index = torch.arange(1000) // 20
    gap = mismatch_metrics(trainer, torch.full((1000,), -0.5), index, 50)
    moved = trainer.clone()
    moved[3] += 8
    inputs = LossInputs(
        current_logprobs_C=moved,
        proximal_logprobs_C=trainer,
        behavior_logprobs_C=torch.full((1000,), -0.5),
        advantages_S=torch.tensor([-1.0, 1.0] * 25),
        sequence_index_C=index,
    )
    stats = policy_loss(PRESETS["grpo"], inputs, Denominators(sequences=50.0, tokens=1000.0, max_tokens=20)).stats
    ratio = policy_metrics(stats)[RATIO]
    assert gap["mismatch/accident_fraction"] == 2e-3 and ratio == pytest.approx(math.exp(8))
    collapsing = {"mismatch/accident_fraction": gap["mismatch/accident_fraction"], RATIO: ratio}
    assert defaults({}) == [] and defaults(collapsing) == list(collapsing)
    with_meaning = r"0\.002, above 0\.001 \(share of tokens that .*; docs/mismatch\.md\)$"
    watch = check(WatchdogConfig().levels, WatchState(), 1, collapsing)
    assert re.search(with_meaning, watch.alarms[0].reason)


@pytest.mark.parametrize("preset", ["pg_seq_is", "pg_seq_mis", "dppo_tv", "icepop", "grpo_token_tis"])
def test_a_mask_is_refused_where_there_is_no_place_for_one(preset: str) -> None:
    with pytest.raises(ConfigError, match=r"levels\[0\].action = .mask. cannot be used with .*algorithm=grpo"):
        require_sound_levels(config(level(action="mask"), preset=preset))


def test_a_mask_is_refused_beside_score_centering_which_allows_no_correction() -> None:
    levels = [{"metric": "mismatch/k3/mean", "above": 1.0, "action": "mask"}]
    algorithm = {"preset": "rloo", "score_centering": 8}
    both = RunConfig.model_validate({"algorithm": algorithm, "watchdog": {"levels": levels}})
    with pytest.raises(ConfigError, match="has score_centering, which centres a loss without a correction"):
        require_sound_levels(both)


@pytest.mark.parametrize("preset", ["grpo", "gspo", "reinforce", "cispo", "dapo"])
def test_a_mask_is_accepted_where_there_is_a_place(preset: str) -> None:
    settings = config(level(action="mask"), preset=preset)
    require_sound_levels(settings)
    correction = masked(resolve_algorithm(settings.algorithm)).correction
    assert (correction.treatment, correction.lower, correction.upper) == ("mask", 0.5, 5.0)
