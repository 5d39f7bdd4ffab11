"""The folder of a run, and the message about it after an interruption."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.run_dir import RunDir
from betterhalf.runs.sanity import run_arm
from betterhalf.runs.sweep_cell import run_cell
from betterhalf.setup.folder import locked, run_folder


def test_an_interruption_names_the_folder_that_holds_something(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    words = f"^interrupted; finished work is in {path}$"
    with pytest.raises(KeyboardInterrupt, match=words), run_folder(str(path), "probe", "demo") as run:
        (run.path / "probe.json").write_text("{}")
        raise KeyboardInterrupt
    assert (path / "probe.json").exists()


@pytest.mark.parametrize("verb", ["train", "sanity", "evaluate"])
def test_an_interruption_of_what_can_be_continued_says_how(verb: str, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt, match="; --resume continues it$"),
        run_folder(str(tmp_path), verb, "x") as run,
    ):
        run.metrics.write_text("")
        raise KeyboardInterrupt


def test_an_interruption_before_anything_was_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="^$"), run_folder(str(tmp_path / "deep" / "run"), "probe", "demo"):
        raise KeyboardInterrupt
    assert not (tmp_path / "deep").exists()


_HOLD = """
import sys, time
from betterhalf.setup.folder import run_folder
with run_folder(sys.argv[1], "train", "x") as run:
    run.metrics.write_text("")
    print("works", flush=True)
    time.sleep(60)
"""


def test_a_folder_that_another_process_works_in_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"works\n"
        words = rf"^another process \(pid {other.pid}\) works in {tmp_path}; wait for it, or use another run_dir$"
        with pytest.raises(InputError, match=words), run_folder(str(tmp_path), "train", "x", resume=True):
            raise AssertionError
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert (tmp_path / "metrics.jsonl").exists()
    with run_folder(str(tmp_path), "train", "x", resume=True):
        pass
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("work", [run_arm, run_cell])
def test_arms_and_cells_are_not_trained_where_another_process_works(
    work: Callable[[RunConfig, str, RunDir], object], tmp_path: Path
) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="works in"):
        work(RunConfig(), "x", RunDir(tmp_path))


def test_a_lock_on_a_file_that_its_holder_has_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, tries = fcntl.flock, []

    def removed_once(lock: int, how: int) -> None:
        tries.append(lock)
        if len(tries) == 1:
            (tmp_path / ".lock").unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", removed_once)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        with pytest.raises(InputError), locked(tmp_path):
            raise AssertionError
    assert len(tries) == 3 and not any(tmp_path.iterdir())


def test_a_file_system_without_locks_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        assert not any(tmp_path.iterdir())
