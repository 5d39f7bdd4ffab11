"""Progress of a sweep on the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from betterhalf.metrics import cells
from betterhalf.metrics.cells import CellsView
from betterhalf.metrics.events import parse


def view(mode: str, out: io.StringIO) -> CellsView:
    """Three cells, one of which has finished earlier."""
    return CellsView(mode, steps={"a": 10, "b": 10}, total=3, stream=out)  # type: ignore[arg-type]


def test_each_result_is_a_line_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cells.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with view("lines", out) as shown:
        for step in range(1, 11):
            shown.show("a", {"step": step, "metrics": {"rollout/reward/mean": 0.5}})
        now[0] += 20
        shown.finish("a", "learned")
        shown.show("b", {"note": "a table"})
        shown.show("b", {"output": "a warning"})
        shown.show("b", {"warning": "warning: wandb ended"})
        shown.finish("b", "failed: why")
    assert out.getvalue().splitlines() == [
        "[2/3, about 20s left] a: learned",
        "b: a warning",
        "b: warning: wandb ended",
        "[3/3] b: failed: why",
    ]


def test_steps_before_a_checkpoint_count_as_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cells.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with view("lines", out) as shown:
        shown.show("a", {"step": 9, "metrics": {}})
        shown.show("a", {"step": 10, "metrics": {}})
        now[0] += 2
        shown.finish("a", "learned")
    assert "about 10s left" in out.getvalue()  # two steps in two seconds, and ten to go


def test_a_terminal_shows_a_bar_and_the_running_cells() -> None:
    out = io.StringIO()
    shown = view("quiet", out)
    shown.show("b", {"step": 4, "metrics": {"rollout/reward/mean": 0.25}})
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(shown._view_now())
    lines = terminal.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("1 of 3 runs") and lines[1].split() == ["b", "step", "4/10", "reward", "0.250"]
    shown.finish("b", "learned")
    assert out.getvalue() == ""


def test_a_parent_process_gets_the_events_with_the_name_of_the_run() -> None:
    out = io.StringIO()
    shown = view("events", out)
    shown.show("a", {"step": 1, "metrics": {}})
    shown.finish("a", "learned")
    events = [parse(line) for line in out.getvalue().rstrip("\n").split("\n")]
    assert events == [{"run": "a", "step": 1, "metrics": {}}, {"run": "a", "note": "learned"}]
