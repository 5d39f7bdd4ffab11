"""Lock of a run folder: at most one process works in a run.

The lock is `flock` on the file `.lock`, which the kernel releases when its holder ends in any way, `kill -9` included.
The content of the file only names the holder for messages, and may be stale.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from betterhalf.errors import InputError, RunError

_LOCK = ".lock"
"""Name of the locked file in a run folder."""

_HELD: set[int] = set()
"""Descriptors of the locks that this process holds."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a run folder.

    Processes that this one starts do not inherit the lock, so none of them can keep it alive. Where the platform or
    the file system has no locks, nothing is refused.

    Raises:
        InputError: another process works in the folder; the message names its process id, host and start.
        RunError: the lock file cannot be created.
    """
    path, process = folder / _LOCK, os.getpid()
    lock = _acquire(path)
    if lock is None:
        yield
        return
    _HELD.add(lock)
    try:
        yield
    finally:
        if process == os.getpid():  # and not a fork of it, which has closed its copy
            _HELD.discard(lock)
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
        lock = _open(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(lock)
            os.close(lock)
            raise InputError(
                f"another process works in {path.parent}: {holder}. Wait for it or end it, or use another run_dir."
            ) from None
        except OSError:
            os.close(lock)
            path.unlink(missing_ok=True)
            return None
        # A holder removes the file before it lets go; the lock of a removed file keeps nobody away.
        if _is_open_at(path, lock):
            _name_holder(lock)
            return lock
        os.close(lock)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(
            f"{path} cannot be created ({error.strerror}), so the run cannot be locked. Check the folder's permissions "
            "and the free space of its disk, or set another run_dir."
        ) from error


def _is_open_at(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _name_holder(lock: int) -> None:
    """Write who holds the lock. On a full disk the lock still works; only messages lose the name of its holder."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(record).encode())


def _holder(lock: int) -> str:
    """Return the holder in words, from the content of the lock file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record: dict[str, Any] = json.loads(os.read(lock, 4096))
        return f"pid {record['pid']} on {record['host']}, since {record['started']}"
    return "its process id is unknown"


def _close_inherited() -> None:
    """Close a fork's copies of the locks: as long as any copy is open, the kernel keeps the lock."""
    for lock in _HELD:
        os.close(lock)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
