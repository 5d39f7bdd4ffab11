"""Terminal output of a run: exact lines, the content of the panel, and warnings alone in the mode `quiet`."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console as RichConsole

from betterhalf.metrics.console import (
    Console,
    OutputMode,
    StepView,
    duration,
    health,
    max_gap,
    number,
    progress,
    show_note,
    sparkline,
)

METRICS = {
    "rollout/reward/mean": 0.7812,
    "mismatch/k3/mean": 2.1e-8,
    "mismatch/prob_gap/max": 1e-4,
    "mismatch/prob_gap/min": -3.1e-4,
    "optim/loss_scale": 65536.0,
    "optim/skipped": 0.0,
    "policy/entropy/mean": 0.31,
    "rollout/length/mean": 35.2,
    "system/tokens_per_second": 6800.0,
    "time/step_seconds": 1.3,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def panel_text(view: StepView, width: int = 80) -> str:
    out = RichConsole(file=io.StringIO(), width=width, force_terminal=False)
    with out.capture() as capture:
        out.print(view.panel(width))
    return capture.get()


def test_a_line_holds_the_step_in_fixed_columns() -> None:
    stream = io.StringIO()
    with Console("lines", total_steps=65, label="fp16", stream=stream) as console:
        console.update(12, METRICS)
    assert stream.getvalue() == (
        "fp16  step 12/65  reward 0.781  k3 2.1e-08 ok    |pi-mu| 3.1e-04  scale 65536  skipped 0  1.3 s  left 1m09s\n"
    )


def test_missing_and_strange_values_show_as_such() -> None:
    stream = io.StringIO()
    with Console("lines", total_steps=5, label="", stream=stream) as console:
        console.update(1, {"mismatch/k3/mean": math.nan, "optim/loss_scale": None})
    line = stream.getvalue()
    assert line.startswith("step 1/5  reward     -  k3     nan high")
    assert "scale     -" in line
    assert line.endswith("left -\n")


def test_skipped_steps_add_up_over_the_run() -> None:
    view = StepView(total_steps=9, label="")
    for step, skipped in enumerate((1.0, 0.0, 2.0, math.nan), start=1):
        view.add(step, {"optim/skipped": skipped})
    assert "skipped 3" in view.line()


def test_time_left_is_the_mean_of_recent_steps_times_the_steps_left() -> None:
    view = StepView(total_steps=100, label="")
    for step in range(1, 41):
        view.add(step, {"time/step_seconds": 50.0 if step <= 30 else 2.0})
    assert view.line().endswith("left 2m00s")


def test_auto_is_lines_away_from_a_terminal_and_live_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream, live in ((io.StringIO(), False), (Terminal(), True)):
        with Console("auto", total_steps=2, label="fp16", stream=stream) as console:
            console.update(1, METRICS)
        assert ("\x1b[" in stream.getvalue()) is live


def test_quiet_prints_nothing() -> None:
    stream = io.StringIO()
    with (
        Console("quiet", total_steps=2, label="x", stream=stream) as console,
        progress("phase", 3, mode="quiet", stream=stream) as phase,
    ):
        console.update(1, METRICS)
        console.note("hello")
        phase.advance()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("mode", ["quiet", "lines"])
def test_warnings_show_in_every_mode(mode: OutputMode, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Console(mode, total_steps=2, label="x", stream=stream) as console:
        console.note("warning: wandb ended")
        console.warn("step 1: watchdog (warn): k3 is 1")
    show_note("warning: the reward failed", mode=mode, stream=stream)
    lines = ["warning: wandb ended", "step 1: watchdog (warn): k3 is 1", "warning: the reward failed"]
    assert stream.getvalue().splitlines() == lines


def test_markup_in_a_note_is_shown_as_it_is() -> None:
    stream = io.StringIO()
    with Console("lines", total_steps=2, label="[bold]x", stream=stream) as console:
        console.note("weights [layers.0] [/red]")
        console.update(1, METRICS)
    assert "weights [layers.0] [/red]\n[bold]x  step 1/2" in stream.getvalue()


def test_the_panel_shows_every_quantity_within_80_columns() -> None:
    view = StepView(total_steps=65, label="fp16")
    for step in range(1, 46):
        view.add(step, METRICS)
    text = panel_text(view, 80)
    for expected in ("fp16", "0.781", "2.1e-08", "ok", "below 0.001", "3.1e-04", "65536", "0.310", "35.2", "6,800"):
        assert expected in text
    assert "step 45/65" in text
    assert "1.3 s a step, 26s left" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_panel_before_the_first_step_says_so() -> None:
    assert "step 1 of 65 is running" in panel_text(StepView(total_steps=65, label="fp16"))


def test_a_phase_away_from_a_terminal_prints_its_start_and_its_end() -> None:
    stream = io.StringIO()
    with progress("perfectible set", 320, mode="auto", stream=stream) as phase:
        phase.advance(300)
        phase.advance()
    assert stream.getvalue() == "perfectible set: 0/320\nperfectible set: 301/320 in 0s\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("mismatch/k3/mean", 1e-3, "ok"),
        ("mismatch/k3/mean", 1.01e-3, "high"),
        ("mismatch/k3/mean", math.nan, "high"),
        ("mismatch/k3/mean", None, ""),
        ("mismatch/ess_fraction", 0.49, "low"),
        ("rollout/reward/mean", 0.5, ""),
    ],
)
def test_health_is_judged_against_the_catalogue(name: str, value: float | None, expected: str) -> None:
    assert health(name, value) == expected


def test_the_largest_gap_is_the_larger_of_the_two_extremes() -> None:
    assert max_gap(METRICS) == 3.1e-4
    assert max_gap({}) is None


def test_sparkline_runs_from_lowest_to_highest_block() -> None:
    assert sparkline([0.0, 1.0, 7.0], 10) == "\u2581\u2582\u2588"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "\u2581\u2588"
    assert sparkline([3.0, 3.0], 10) == "\u2584\u2584"
    assert sparkline([], 10) == ""


def test_durations_and_numbers_are_written_for_people() -> None:
    assert [duration(s) for s in (8.2, 69, 7500, math.nan)] == ["8s", "1m09s", "2h05m", "-"]
    assert [number(v, ".1e") for v in (None, math.inf, 2e-8)] == ["-", "inf", "2.0e-08"]


def test_the_panel_shows_the_budget() -> None:
    view = StepView(total_steps=9, label="fp16")
    view.add(1, {**METRICS, "budget/predicted_ess": 0.97, "budget/observed_ess": 0.9412, "budget/max_length": 21422.6})
    row = next(line for line in panel_text(view).splitlines() if "predicted ESS" in line)
    assert row.split() == [
        "\u2502",
        "predicted",
        "ESS",
        "0.970",
        "observed",
        "0.941",
        "max",
        "length",
        "21,423",
        "\u2502",
    ]
    view.add(2, {**METRICS, "budget/max_length": math.inf})
    assert "max length  inf" in panel_text(view)
