"""Start a worker of the grader, and find out why none starts."""

from __future__ import annotations

import multiprocessing.spawn
import os
import pickle
import re
import signal
import subprocess
import sys

from betterhalf.tasks.math_equal import equivalent

WORKER_MEMORY_BYTES = 4 * 2**30
"""Address space of a worker beyond its imports: 10^{10^{10}} must end in its own MemoryError, not in the trainer's."""
REHEARSAL_SECONDS = 120.0
"""Limit on a rehearsed start, which imports the main module again."""

_REHEARSAL = """
import pickle, sys
from multiprocessing import process, spawn
data = pickle.load(sys.stdin.buffer)
process.current_process()._inheriting = True
spawn.prepare(data)
from betterhalf.tasks.grader_worker import start_worker
start_worker()
"""
_ERROR_LINE = re.compile(r"^(?:[A-Za-z_][\w.]*)?(?:Error|Exception|Exit|Interrupt|Warning)\b", re.MULTILINE)


def start_worker() -> None:
    """Leave interrupts to the parent, bound the memory, and import and compile before any clock runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    equivalent("3", "6/2")
    _bound_memory()


def why_workers_fail() -> str | None:
    """Start a worker once more, with its messages caught; return the last error, or None if it starts.

    The start is that of `multiprocessing`: the main module is imported under another name.
    """
    data = multiprocessing.spawn.get_preparation_data("rehearsal")
    data.pop("authkey", None)  # a secret, which refuses to be pickled
    command = [sys.executable, "-c", _REHEARSAL]
    try:
        done = subprocess.run(
            command, input=pickle.dumps(data), capture_output=True, timeout=REHEARSAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing the main module takes more than {REHEARSAL_SECONDS:g} s"
    if done.returncode == 0:
        return None
    return _last_error_of(done.stderr.decode(errors="replace")) or f"it ends with status {done.returncode}"


def last_error(error: BaseException) -> str:
    """Return the last line of an error's traceback."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last_error_of(messages: str) -> str:
    """Return the last error in a process's messages, on one line."""
    found = [match.start() for match in _ERROR_LINE.finditer(messages)]
    lines = messages[found[-1] :] if found else next(iter(messages.strip().splitlines()[-1:]), "")
    return " ".join(lines.split())[:400].rstrip(".")


def _bound_memory() -> None:
    try:
        import resource

        limit = _address_space() + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit, and some systems refuse it.


def _address_space() -> int:
    """Return the address space in use: a main module that imports CUDA may hold more than the limit already."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0  # only Linux tells
