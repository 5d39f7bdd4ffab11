"""At most one process works in a run folder, and a process that was killed keeps nobody away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from betterhalf.errors import InputError, RunError
from betterhalf.run_lock import run_lock
from betterhalf.setup.folder import run_folder

_HOLD = """
import subprocess, sys, time
from betterhalf.setup.folder import run_folder
with run_folder(sys.argv[1], "train", "x") as run:
    run.metrics.write_text("")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_folder_that_another_process_works_in_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    child = int(other.stdout.readline())
    try:
        holder = rf"pid {other.pid} on {socket.gethostname()}, since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
        words = rf"^another process works in {tmp_path}: {holder}\. Wait for it or end it, or use another run_dir\.$"
        with pytest.raises(InputError, match=words), run_folder(str(tmp_path), "train", "x", resume=True):
            raise AssertionError
        other.send_signal(signal.SIGKILL)
        other.wait()
        # The child that the holder had started outlives it.
        os.kill(child, 0)
        assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / ".lock").exists()
        with run_folder(str(tmp_path), "train", "x", resume=True):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        other.kill()
        other.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fork_neither_keeps_the_lock_nor_takes_it_away(tmp_path: Path) -> None:
    """A fork that leaves the block must not remove the file, and one that outlives it must not keep the lock."""
    ready, go = os.pipe(), os.pipe()
    with run_lock(tmp_path):
        leaves = os.fork()
        if leaves == 0:
            try:
                with run_lock(tmp_path):
                    os._exit(1)
            except InputError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(leaves, 0)[1]) == 7
        stays = os.fork()
        if stays == 0:
            os.write(ready[1], b".")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        assert (tmp_path / ".lock").exists()
        with pytest.raises(InputError), run_lock(tmp_path):
            raise AssertionError
    try:
        with run_lock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    finally:
        os.write(go[1], b".")
        os.waitpid(stays, 0)
        for end in (*ready, *go):
            os.close(end)
    assert not any(tmp_path.iterdir())


def test_a_fork_that_leaves_the_block_keeps_the_lock_of_its_parent(tmp_path: Path) -> None:
    parent = os.getpid()
    with run_lock(tmp_path):
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            with pytest.raises(InputError), run_lock(tmp_path):
                raise AssertionError
    if os.getpid() != parent:
        os._exit(0)


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
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(InputError), run_lock(tmp_path):
            raise AssertionError
    assert len(tries) == 3 and not any(tmp_path.iterdir())


def test_a_file_system_without_locks_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path), run_lock(tmp_path):
        assert not any(tmp_path.iterdir())


def test_a_full_disk_locks_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with run_lock(tmp_path):
        words = "its process id is unknown. Wait for it or end it"
        with pytest.raises(InputError, match=words), run_lock(tmp_path):
            raise AssertionError


def test_a_lock_file_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"\.lock cannot be created .*set another run_dir"), run_lock(tmp_path / "gone"):
        raise AssertionError
