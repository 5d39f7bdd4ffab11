"""Trackers of any kind: what arrives, what is sent again, and what a broken one does to the run, which is nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from betterhalf.run_dir import read_jsonl
from betterhalf.tracking import kinds, tracking
from betterhalf.tracking.feed import QUEUE_ROWS
from betterhalf.tracking.kinds import TrackerKind
from betterhalf.tracking.tracker import TrackedRun
from betterhalf.tracking.tracking import Tracking

ROOT = Path(__file__).parents[3]
LONG = 120.0
ALARM = {"step": 2, "metric": "mismatch/k3/mean", "action": "warn", "reason": "too high"}

Start = Callable[..., Tracking]


def described(folder: Path, **changes: Any) -> TrackedRun:
    fields: dict[str, Any] = {
        "name": "demo",
        "folder": str(folder),
        "kind": "train",
        "part_of": None,
        "project": None,
        "group": None,
        "tags": [],
        "mode": None,
        "prometheus_host": "127.0.0.1",
        "prometheus_port": 19464,
        "steps": 4,
        "config": {"seed": 0},
        "contract": {"ok": True, "first_difference": None, "rows": []},
        "environment": {},
    }
    return TrackedRun(**{**fields, **changes})


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start one of the fake trackers on the run folder of the test; its processes end with the test."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}")
    started: list[Tracking] = []

    def begin(fake: str, timeout: float = LONG, **more: Any) -> Tracking:
        monkeypatch.setattr(tracking, "TRACKERS", {"wandb": TrackerKind(package="json", place=f"fake_trackers:{fake}")})
        started.append(
            Tracking(["wandb"], described(tmp_path), tmp_path / "tracking", timeout=timeout, **more),
        )
        return started[-1]

    yield begin
    for one in started:
        for feed in one._feeds:
            feed.close_input({"status": "failed", "summary": {}})
            feed.close(time.monotonic())


def wait_for(condition: Callable[[], bool], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def kept(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "kept.jsonl")


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in kept(folder) if "step" in row]


def log_rows(one: Tracking, *numbers: int) -> None:
    for step in numbers:
        one.log(step, {"mismatch/k3/mean": step * 1e-5, "optim/grad_norm": None})


def test_everything_arrives_in_order_without_what_was_not_measured(start: Start, tmp_path: Path) -> None:
    one = start("Keeps")
    log_rows(one, 1, 2)
    one.alarm(ALARM)
    one.finish("finished", {"steps": 2, "extra": float("nan")})
    assert list(one.notes()) == [f"wandb: the file {tmp_path / 'kept.jsonl'}"]
    assert kept(tmp_path) == [
        {"opened": {}, "name": "demo", "group": None, "kind": "train"},
        {"step": 1, "mismatch/k3/mean": 1e-5},
        {"step": 2, "mismatch/k3/mean": 2e-5},
        {"alarm": "mismatch/k3/mean"},
        {"status": "finished", "steps": 2},
    ]


def test_a_resumed_run_continues_and_sends_only_what_is_missing(start: Start, tmp_path: Path) -> None:
    one = start("RaisesAtOddRows")
    log_rows(one, 1, 2)
    one.alarm(ALARM)
    one.finish("failed", {})
    assert any("refused a message (OSError: no route" in note for note in one.notes())
    again = start("Keeps", backlog=[{"step": step, "mismatch/k3/mean": 0.5} for step in (1, 2, 3)])
    log_rows(again, 3, 4)  # step 3 is repeated after the checkpoint
    again.alarm(ALARM)
    again.finish("finished", {"steps": 4})
    assert [row["opened"] for row in kept(tmp_path) if "opened" in row] == [{}, {"id": "first"}]
    assert steps(tmp_path) == [2, 1, 3, 4]
    assert [row for row in kept(tmp_path) if "alarm" in row] == [{"alarm": "mismatch/k3/mean"}]


def test_a_tracker_that_needs_order_gets_no_late_row(start: Start, tmp_path: Path) -> None:
    one = start("InOrder")
    log_rows(one, 3, 2, 4)
    one.finish("finished", {})
    assert steps(tmp_path) == [3, 4]
    assert "wandb has 2 of 3 rows: 1 came after a later step, which it does not take" in "\n".join(one.notes())


def test_a_tracker_that_hangs_costs_no_time_until_the_end_and_a_bounded_time_then(start: Start, tmp_path: Path) -> None:
    one = start("Hangs", timeout=0.5)
    row = {f"task/value_{number}": float(number) for number in range(100)}
    started = time.perf_counter()
    for step in range(1, 2 * QUEUE_ROWS + 1):
        one.log(step, row)
    assert time.perf_counter() - started < 2.0  # a microsecond's work each; a second of room for a busy machine
    started = time.perf_counter()
    one.finish("finished", {})
    assert time.perf_counter() - started < 10.0
    (note,) = one.notes()
    assert f"wandb has 0 of {2 * QUEUE_ROWS} rows: it did not finish in time (logging.tracker_timeout)" in note
    assert "were dropped because it was slow" in note
    assert "metrics.jsonl has all of them" in note
    with pytest.raises(ProcessLookupError):
        os.kill(one._feeds[0].pid, 0)


def test_rows_beyond_the_queue_are_dropped_counted_and_sent_by_a_resumed_run(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betterhalf.tracking.feed.QUEUE_ROWS", 2)
    one = start("Keeps")
    wait_for(lambda: bool(kept(tmp_path)))  # opened, so the queue is empty
    feed = one._feeds[0]
    os.kill(feed.pid, signal.SIGSTOP)
    # The pipe holds 64 KiB and the writer one message more; the queue then fills.
    big = {f"task/value_{number}": float(number) for number in range(4000)}
    for step in range(1, 13):
        one.log(step, big)
        time.sleep(0.02)
    os.kill(feed.pid, signal.SIGCONT)
    one.finish("finished", {})
    (missing,) = (note for note in one.notes() if note.startswith("warning"))
    arrived = steps(tmp_path)
    assert 0 < len(arrived) < 12
    assert missing.startswith(
        f"warning: wandb has {len(arrived)} of 12 rows: {12 - len(arrived)} were dropped because it was slow"
    )
    again = start("Keeps", backlog=[{"step": step, "task/x": 1.0} for step in range(1, 13)])
    again.finish("finished", {})
    assert sorted(steps(tmp_path)) == list(range(1, 13))


def test_a_tracker_that_cannot_open_is_named_with_its_output(start: Start, tmp_path: Path) -> None:
    one = start("RaisesAtOpen")
    log_rows(one, 1)
    one.finish("finished", {})
    notes = "\n".join(one.notes())
    assert "wandb has 0 of 1 rows: its process ended with exit status 1" in notes
    assert "no route to the server" in (tmp_path / "tracking/wandb/output.log").read_text()


def test_a_tracker_whose_process_is_killed_is_reported_at_once_and_at_the_end(start: Start, tmp_path: Path) -> None:
    one = start("Keeps")
    log_rows(one, 1)
    wait_for(lambda: steps(tmp_path) == [1])
    os.kill(one._feeds[0].pid, signal.SIGKILL)
    seen: list[str] = []
    wait_for(lambda: seen.extend(one.notes()) or any("SIGKILL" in note for note in seen))  # type: ignore[func-returns-value]
    assert seen[-1] == "warning: wandb ended with signal SIGKILL; the run goes on without it"
    log_rows(one, 2, 3)
    one.finish("finished", {})
    (note,) = one.notes()
    assert "wandb has 1 of 3 rows: its process ended with signal SIGKILL" in note


def test_a_run_that_is_killed_still_gives_its_tracker_what_was_on_its_way(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from betterhalf.tracking import tracking\n"
        "from betterhalf.tracking.kinds import TrackerKind\n"
        "from tests.unit.tracking.test_tracking import described, log_rows\n"
        "folder = Path(os.environ['FOLDER'])\n"
        "tracking.TRACKERS = {'wandb': TrackerKind(package='json', place='fake_trackers:Keeps')}\n"
        "one = tracking.Tracking(['wandb'], described(folder), folder / 'tracking', timeout=60.0)\n"
        "log_rows(one, 1, 2, 3)\n"
        "while one._feeds[0]._queue.qsize(): time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "FOLDER": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, timeout=LONG, check=False)
    assert ended.returncode == -signal.SIGKILL
    wait_for(lambda: bool(kept(tmp_path)) and "status" in kept(tmp_path)[-1])
    assert steps(tmp_path) == [1, 2, 3]
    assert kept(tmp_path)[-1]["status"] == "failed"


def test_an_interrupted_run_waits_five_seconds_at_most(start: Start) -> None:
    one = start("Hangs", timeout=LONG)
    started = time.perf_counter()
    one.finish("interrupted", {})
    assert time.perf_counter() - started < 20.0


def test_without_trackers_nothing_is_started(tmp_path: Path) -> None:
    one = Tracking([], described(tmp_path), tmp_path / "tracking", timeout=1.0)
    one.log(1, {})
    one.finish("finished", {})
    assert list(one.notes()) == []
    assert not list(tmp_path.iterdir())


def test_the_settings_hold_the_verdict_of_the_contract() -> None:
    rows = [{"region": "compute", "trainer": "fp16", "engine": "bf16", "status": "differs"}]
    contract = {"ok": False, "first_difference": "compute", "rows": rows}
    found = described(Path("/runs/x"), contract=contract, environment={"torch": "2"}).settings
    assert found == {
        "seed": 0,
        "contract": {"ok": False, "first_difference": "compute", "compute": "fp16 | bf16 | differs"},
        "environment": {"torch": "2"},
    }


def test_every_kind_names_a_class_and_the_extra_of_its_name() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, kind in kinds.TRACKERS.items():
        module, _, found = kind.place.partition(":")
        source = ROOT / "src" / Path(*module.split(".")).with_suffix(".py")
        assert f"class {found}:" in source.read_text()
        assert name in extras
