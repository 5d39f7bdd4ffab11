"""Events: repetitions are merged, restarts are included, and each event is flagged on its figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from betterhalf.report.data import Arm, load
from betterhalf.report.drawing import drawings_of
from betterhalf.report.events import event_marks, events_of, events_table, watchdog_bounds
from betterhalf.report.page import render
from betterhalf.run_dir import RunDir, append_jsonl, write_json_atomic


def row(step: int, metric: str = "mismatch/k3/mean", action: str = "warn") -> dict[str, Any]:
    return {"step": step, "metric": metric, "value": 0.02 * step, "bound": 0.01, "action": action, "reason": "<why>"}


def make_run(path: Path, rows: list[dict[str, Any]], restarts: tuple[float, ...] = ()) -> RunDir:
    run = RunDir.create(path, resume=False)
    for step, count in enumerate(restarts, start=1):
        append_jsonl(run.metrics, {"step": step, "mismatch/k3/mean": 1e-6, "rollout/engine_restarts": count})
    for event in rows:
        append_jsonl(run.path / "watchdog.jsonl", event)
    return run


def arm_of(path: Path, rows: list[dict[str, Any]], restarts: tuple[float, ...] = ()) -> Arm:
    return load([make_run(path, rows, restarts)]).arms[0]


def test_the_same_event_on_consecutive_steps_is_one(tmp_path: Path) -> None:
    arm = arm_of(tmp_path / "run", [row(3), row(4), row(4, action="mask"), row(5), row(9), {"metric": "no step"}])
    found = [(event.first, event.last, event.action) for event in events_of(arm)]
    assert found == [(3, 5, "warn"), (4, 4, "mask"), (9, 9, "warn")]
    assert events_of(arm)[0].value == 0.06


def test_a_restart_is_an_event_of_its_step(tmp_path: Path) -> None:
    arm = arm_of(tmp_path / "run", [], restarts=(0.0, 1.0, 0.0, 2.0))
    assert [(event.first, event.action) for event in events_of(arm)] == [
        (2, "engine restarted"),
        (4, "engine restarted"),
    ]


def test_a_restart_of_the_ranks_is_another_event(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], restarts=(1.0,))
    append_jsonl(run.metrics, {"step": 2, "rollout/engine_restarts": 0.0, "optim/rank_restarts": 2.0})
    (arm,) = load([run]).arms
    found = [(event.first, event.action, event.metric, event.value) for event in events_of(arm)]
    assert found == [
        (1, "engine restarted", "rollout/engine_restarts", 1.0),
        (2, "ranks restarted", "optim/rank_restarts", 2.0),
    ]
    assert "a rank ended; all started again" in events_table([arm])


def test_an_event_is_flagged_on_its_figure_else_on_the_mismatch(tmp_path: Path) -> None:
    arm = arm_of(tmp_path / "run", [row(1), row(2, "budget/predicted_ess"), row(3, "rollout/unheard_of")])
    every = ["mismatch/k3/mean", "budget/predicted_ess"]
    assert [mark.step for mark in event_marks(arm, ["mismatch/k3/mean"], every)] == [1, 3]
    assert [mark.step for mark in event_marks(arm, ["budget/predicted_ess"], every)] == [2]


def test_bounds_come_from_the_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [row(1)])
    levels = [{"metric": "mismatch/k3/mean", "above": 0.5, "below": None, "action": "stop"}, {"metric": "other"}]
    write_json_atomic(run.config, {"watchdog": {"levels": levels}})
    (arm,) = load([run]).arms
    assert watchdog_bounds(arm, ["mismatch/k3/mean"]) == [(0.5, "watchdog: stop")]


def test_the_page_flags_events_and_lists_them_as_text(tmp_path: Path) -> None:
    page = render(load([make_run(tmp_path / "run", [row(2)], restarts=(0.0, 0.0, 1.0))]))
    events = [event for drawing in drawings_of(page) for event in drawing.tables.get("events", ())]
    assert [event["x"] for event in events if event["flag"]] == [[2]]
    assert "A flag marks an event" in page
    assert "&lt;why&gt;" in page
    assert "engine restarted" in page


def test_no_event_no_table(tmp_path: Path) -> None:
    assert events_table([arm_of(tmp_path / "run", [], restarts=(0.0,))]) == ""
