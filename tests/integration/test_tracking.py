"""Whole runs with trackers: a resumed one continues its own, arms share a group, a broken one changes no metric."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts
from betterhalf.runs.progress import Progress
from betterhalf.runs.sanity import sanity
from betterhalf.runs.train import run_training, train
from betterhalf.tracking import kinds, tracking
from betterhalf.tracking.kinds import TrackerKind

Configured = Callable[..., RunConfig]
Ends = Callable[..., str]
Fakes = Callable[[str], dict[str, Any]]

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "experiments" / "smoke" / "demo.toml"
RISING = [{"metric": "mismatch/k3/mean", "above": 1e-30, "action": "warn"}]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Put a fake tracker in the place of W&B, and return the section `[logging]` that chooses it."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}")

    def chosen(name: str) -> dict[str, Any]:
        table = {"wandb": TrackerKind(package="json", place=f"fake_trackers:{name}")}
        monkeypatch.setattr(kinds, "TRACKERS", table)
        monkeypatch.setattr(tracking, "TRACKERS", table)
        return {"console": "lines", "trackers": ["wandb"], "tracker_timeout": 120.0}

    return chosen


def kept(run: Path) -> list[dict[str, Any]]:
    return read_jsonl(run / "kept.jsonl")


def same_numbers(left: Path, right: Path) -> bool:
    def rows(run: Path) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
            for row in read_jsonl(run / "metrics.jsonl")
        ]

    return rows(left) == rows(right)


def test_an_interrupted_run_and_its_continuation_are_one_run_without_a_row_twice(
    small_config: Configured, fake: Fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(
        logging=fake("Keeps") | {"group": "mine", "tags": ["short"]},
        watchdog={"levels": RISING},
        training={"steps": 4, "prompts_per_step": 2, "checkpoint_every": 2},
    )
    collect = loop.collect_groups

    def interrupted(parts: Parts, progress: Progress, *more: Any) -> Any:
        if progress.step == 3:
            raise KeyboardInterrupt
        return collect(parts, progress, *more)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "collect_groups", interrupted)
        # The machine may need longer than an interrupted run waits for its trackers.
        patched.setattr(tracking, "_INTERRUPTED_SECONDS", 120.0)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, RunDir.create(tmp_path / "run", resume=False), resume=False, label="x")
    run_training(config, RunDir.create(tmp_path / "run", resume=True), resume=True, label="x")
    rows = kept(tmp_path / "run")
    assert [row["opened"] for row in rows if "opened" in row] == [{}, {"id": "first"}]
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3, 4]
    measured = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    for row, sent in zip(measured[:2], [row for row in rows if "step" in row], strict=False):
        assert sent == {name: value for name, value in row.items() if value is not None}
    # The first alarm of a stretch of steps is sent, as it is shown; its step comes before the checkpoint.
    assert [row for row in rows if "alarm" in row] == [{"alarm": "mismatch/k3/mean"}]
    assert [row["status"] for row in rows if "status" in row] == ["interrupted", "finished"]
    assert rows[-1]["steps"] == 4


def test_a_tracker_that_was_chosen_later_gets_the_steps_before(
    small_config: Configured, fake: Fakes, tmp_path: Path
) -> None:
    train(small_config(), str(tmp_path / "run"), resume=False)
    train(small_config(logging=fake("Keeps")), str(tmp_path / "run"), resume=True)
    assert [row["step"] for row in kept(tmp_path / "run") if "step" in row] == [1, 2]


def test_a_tracker_that_hangs_or_is_killed_changes_no_metric(
    small_config: Configured,
    fake: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(small_config(), str(tmp_path / "alone"), resume=False)
    hanging = small_config(logging=fake("Hangs") | {"tracker_timeout": 0.2})
    train(hanging, str(tmp_path / "hanging"), resume=False)
    assert "warning: wandb has 0 of 2 rows: it did not finish in time" in capsys.readouterr().err
    send = tracking.Feed.send

    def killed(feed: Any, message: Any) -> None:
        if message.get("step") == 2:
            os.kill(feed.pid, signal.SIGKILL)
            time.sleep(0.5)
        send(feed, message)

    with monkeypatch.context() as patched:
        patched.setattr(tracking.Feed, "send", killed)
        # Its warnings show even without progress.
        train(small_config(logging=fake("Keeps") | {"console": "quiet"}), str(tmp_path / "killed"), resume=False)
    err = capsys.readouterr().err
    assert "warning: wandb ended with signal SIGKILL; the run goes on without it" in err
    assert "of 2 rows: its process ended with signal SIGKILL" in err
    assert same_numbers(tmp_path / "alone", tmp_path / "hanging")
    assert same_numbers(tmp_path / "alone", tmp_path / "killed")


def test_the_arms_of_a_sanity_run_are_one_group(small_config: Configured, fake: Fakes, tmp_path: Path) -> None:
    settings = {"candidates": 24, "samples": 10, "evaluation_samples": 4, "pass_accuracy": 0.3, "arms_at_once": 1}
    sanity(small_config(logging=fake("Keeps"), sanity=settings), str(tmp_path / "twins"))
    opened = [kept(tmp_path / "twins" / "arms" / name)[0] for name in ("fp16", "bf16")]
    assert [(row["name"], row["group"], row["kind"]) for row in opened] == [
        ("small-fp16", "twins", "arm"),
        ("small-bf16", "twins", "arm"),
    ]


def test_a_stop_by_the_watchdog_ends_the_trackers_run_as_stopped(
    small_config: Configured, fake: Fakes, ends: Ends, tmp_path: Path
) -> None:
    fake("Keeps")
    stop = json.dumps([{**RISING[0], "action": "stop"}])
    overrides = ("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", f"watchdog.levels={stop}")
    more = (
        *("training.optimizer_steps=1", "logging.trackers=wandb"),
        *("logging.tracker_timeout=120", "logging.console=quiet"),
    )
    ends(3, "train", SMOKE, *overrides, *more, f"run_dir={tmp_path / 'run'}")
    rows = kept(tmp_path / "run")
    assert [row for row in rows if "alarm" in row] == [{"alarm": "mismatch/k3/mean"}]
    assert rows[-1] == {"status": "stopped", "steps": 0}


@pytest.mark.parametrize("verb", ["train", "sanity"])
def test_a_tracker_without_its_package_is_refused_with_the_command(
    verb: str, ends: Ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = TrackerKind(package="not_installed_here", place="nowhere:Run")
    monkeypatch.setattr(kinds, "TRACKERS", {"trackio": missing})
    err = ends(2, verb, SMOKE, "logging.trackers=trackio", f"run_dir={tmp_path / 'run'}")
    assert "needs the package not_installed_here, which is not installed" in err
    assert "pip install 'betterhalf[trackio]'" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.extra
def test_wandb_without_a_login_is_refused_before_anything_else(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kinds, "_LOGIN_SECONDS", 250.0)
    err = ends(2, "train", SMOKE, "logging.trackers=wandb", "model=missing", f"run_dir={tmp_path / 'run'}")
    assert "is not logged in" in err
    assert "Run `wandb login`, set WANDB_API_KEY, or write files for `wandb sync` with logging.mode=offline." in err
    assert not (tmp_path / "run").exists()


def test_a_port_of_prometheus_that_is_taken_is_skipped_and_a_foreign_address_refused(
    ends: Ends, tmp_path: Path
) -> None:
    import socket

    from betterhalf.tracking.prometheus_run import free_port

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) != port
    pytest.importorskip("prometheus_client", reason="needs the extra prometheus")
    chosen = ("logging.trackers=prometheus", "logging.prometheus_host=192.0.2.1", f"run_dir={tmp_path / 'run'}")
    assert "logging.prometheus_host=192.0.2.1 cannot be listened on" in ends(2, "train", SMOKE, *chosen)


def test_only_the_process_of_the_run_tracks() -> None:
    """Ranks and engines, which Ray starts, live in `cluster`, `training` and `rollout`: none of them can track."""
    users = {
        file.relative_to(ROOT / "src/betterhalf").parts[0]
        for file in (ROOT / "src/betterhalf").rglob("*.py")
        if "from betterhalf.tracking" in file.read_text(encoding="utf-8")
    }
    assert users == {"runs", "tracking"}
