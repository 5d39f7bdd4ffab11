"""The folder of a run, created before anything expensive, and removed if nothing was written to it."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from betterhalf.errors import InputError
from betterhalf.run_dir import RunDir

_RESUMABLE = ("train", "sanity", "evaluate", "sweep")
"""Verbs that take --resume."""

_LOCK = ".lock"
"""File in a run folder that the process working there holds locked; it holds the process id."""


def default_run_dir(verb: str, name: str) -> Path:
    """Return `runs/<verb>-<name>-<time>`, in local time to the second; with a number if that exists."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    base = Path("runs", f"{verb}-{safe}-{time.strftime('%Y%m%d-%H%M%S')}")
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


@contextmanager
def run_folder(run_dir: str | None, verb: str, name: str, *, resume: bool = False) -> Iterator[RunDir]:
    """Create the folder at `run_dir`, or at `runs/<verb>-<name>-<time>`, and yield it.

    Bad input is often found only when model and data are read. If nothing has been written when the body ends, the
    folders created here are removed, so that a corrected command can use the same path.

    Raises:
        InputError: see `RunDir.create` and `locked`.
        KeyboardInterrupt: the body was interrupted; the message names the folder if it holds something.
    """
    path = Path(run_dir) if run_dir else default_run_dir(verb, name)
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        run = RunDir.create(path, resume=resume)
        with locked(run.path):
            yield run
    except KeyboardInterrupt as interrupt:
        if path.is_dir() and any(path.iterdir()):
            go_on = "; --resume continues it" if verb in _RESUMABLE else ""
            raise KeyboardInterrupt(f"interrupted; finished work is in {path}{go_on}") from interrupt
        raise
    finally:
        _remove_empty(made)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a run folder; the kernel releases the lock of a process that is killed.

    Without a lock if the platform or the file system has none.

    Raises:
        InputError: another process works in the folder.
    """
    path = folder / _LOCK
    lock = _acquire(path)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held: whoever opens it now finds out in `_acquire`
            os.close(lock)


def _acquire(path: Path) -> int | None:
    """Lock the file, created if missing, and return its descriptor; None where files cannot be locked."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder removes the file before it lets go; the lock of a removed file keeps nobody away.
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                os.ftruncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
                return lock
        except BlockingIOError:
            pid = os.read(lock, 20).decode(errors="replace") or "unknown"
            os.close(lock)
            raise InputError(
                f"another process (pid {pid}) works in {path.parent}; wait for it, or use another run_dir"
            ) from None
        except OSError:
            os.close(lock)
            path.unlink(missing_ok=True)
            return None
        os.close(lock)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove the folders, innermost first, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
