"""Progress of several processes: their events, and one view of all of them."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console as RichConsole

from betterhalf.metrics import events
from betterhalf.metrics.console import Console, progress, show_note
from betterhalf.metrics.several import SeveralRuns

METRICS = {"rollout/reward/mean": 0.5, "mismatch/k3/mean": 2e-8, "time/step_seconds": 2.0, "optim/first_offender": None}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def child_output(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any] | None]:
    """The events of a child that runs one step, prints a note and finishes a phase."""
    monkeypatch.setenv(events.VARIABLE, "1")
    stream = io.StringIO()
    with Console("auto", total_steps=2, label="fp16", stream=stream) as console:
        console.note("hello")
        console.update(1, METRICS | {"policy/loss": math.nan})
    with progress("fp16: final accuracy", 3, stream=stream) as bar:
        bar.advance(2)
        bar.advance()
    monkeypatch.delenv(events.VARIABLE)
    # Not splitlines: it ends lines at the mark of an event as well.
    return [events.parse(line) for line in stream.getvalue().removesuffix("\n").split("\n")]


def test_a_child_shows_its_progress_as_events(monkeypatch: pytest.MonkeyPatch) -> None:
    note, step, *phases = child_output(monkeypatch)
    assert note == {"note": "hello"}
    assert step is not None and step["step"] == 1
    assert step["metrics"]["rollout/reward/mean"] == 0.5
    assert math.isnan(step["metrics"]["policy/loss"])
    assert phases == [{"phase": "fp16: final accuracy", "done": done, "total": 3} for done in (0, 2, 3)]


def test_other_output_is_not_an_event() -> None:
    for line in ("a warning", '{"step": 1}', "\x1e{torn", "\x1e[1]"):
        assert events.parse(line) is None


def test_a_quiet_child_stays_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(events.VARIABLE, "1")
    stream = io.StringIO()
    with Console("quiet", total_steps=1, label="x", stream=stream) as console:
        console.note("hello")
    assert stream.getvalue() == ""


def test_a_warning_of_a_quiet_child_reaches_a_quiet_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet child writes text, any other an event."""
    monkeypatch.setenv(events.VARIABLE, "1")
    shown = []
    for mode in ("quiet", "auto"):
        stream = io.StringIO()
        with Console(mode, total_steps=1, label="x", stream=stream) as console:  # type: ignore[arg-type]
            console.note("warning: wandb ended")
        show_note("warning: the reward failed", mode=mode, stream=stream)  # type: ignore[arg-type]
        shown.append([events.parse(line) or line for line in stream.getvalue().removesuffix("\n").split("\n")])
    monkeypatch.delenv(events.VARIABLE)
    assert shown[0] == ["warning: wandb ended", "warning: the reward failed"]
    assert shown[1] == [{"warning": text} for text in shown[0]]
    stream = io.StringIO()
    with SeveralRuns("quiet", labels=("a",), total_steps=2, stream=stream) as view:
        for event in shown[1]:
            view.show("a", event)  # type: ignore[arg-type]
    assert stream.getvalue() == "a: warning: wandb ended\na: warning: the reward failed\n"


def test_lines_of_several_runs_carry_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    shown = [event for event in child_output(monkeypatch) if event is not None]
    with SeveralRuns("lines", labels=("fp16", "bf16"), total_steps=2, stream=stream) as view:
        for event in shown:
            view.show("fp16", event)
        view.show("bf16", {"note": "two\nlines"})
        view.show("bf16", {"error": "InputError", "message": "shown by whoever raises it"})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "fp16: hello"
    assert lines[1].startswith("fp16  step 1/2  reward 0.500")
    assert lines[2] == "fp16: final accuracy: 0/3"
    assert lines[3].startswith("fp16: final accuracy: 3/3 in ")
    assert lines[4:] == ["bf16:", "two", "lines"]


def test_on_a_terminal_each_run_has_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with SeveralRuns("auto", labels=("fp16", "bf16"), total_steps=2, stream=stream) as view:
        view.show("bf16", {"step": 1, "metrics": METRICS})
        view.show("bf16", {"phase": "bf16: final accuracy", "done": 1, "total": 3})
    last = stream.getvalue().rpartition("\x1b[")[0]
    for text in (" fp16 ", "step 1 of 2 is running", " bf16 ", "step 1/2", "bf16: final accuracy: 1/3"):
        assert text in last


def test_quiet_shows_only_output_that_is_not_an_event() -> None:
    stream = io.StringIO()
    with SeveralRuns("quiet", labels=("a",), total_steps=2, stream=stream) as view:
        view.show("a", {"step": 1, "metrics": METRICS})
        view.show("a", {"note": "hello"})
        view.show("a", {"phase": "p", "done": 0, "total": 1})
        view.show("a", {"output": "a warning"})
    assert stream.getvalue() == "a: a warning\n"


def test_phases_with_one_name_are_distinguished() -> None:
    stream = io.StringIO()
    with SeveralRuns("lines", labels=("a", "b"), total_steps=2, stream=stream) as view:
        for label in ("a", "b"):
            view.show(label, {"phase": "check rows", "done": 0, "total": 9})
    assert stream.getvalue().splitlines() == ["a: check rows: 0/9", "b: check rows: 0/9"]


def test_events_are_passed_on_to_a_parent_that_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [event for event in child_output(monkeypatch) if event is not None]
    monkeypatch.setenv(events.VARIABLE, "1")
    stream = io.StringIO()
    with SeveralRuns("auto", labels=("fp16",), total_steps=2, stream=stream) as view:
        for event in [*shown, {"error": "InputError", "message": "shown by whoever raises it"}]:
            view.show("fp16", event)
    passed = [events.parse(line) for line in stream.getvalue().removesuffix("\n").split("\n")]
    assert [event and event.pop("run") for event in passed] == ["fp16"] * len(shown)
    assert [str(event) for event in passed] == [
        str(event) for event in shown
    ]  # as text, because NaN does not equal itself


def test_of_many_runs_only_those_that_are_running_have_a_panel() -> None:
    view = SeveralRuns("live", labels=("done", "running", "waiting"), total_steps=2, stream=io.StringIO())
    for label, step in (("done", 1), ("done", 2), ("running", 1)):
        view.show(label, {"step": step, "metrics": METRICS})
    console = RichConsole(file=io.StringIO(), width=80)
    console.print(view._view_now())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("done  step 2/2")
    assert "running" in lines[1] and lines[1][0] not in "r "
    assert "waiting" not in console.file.getvalue()  # type: ignore[attr-defined]
