"""Initialise a worker process of the grader, and diagnose why workers fail to start."""

from __future__ import annotations

import multiprocessing.spawn
import pickle
import re
import signal
import subprocess
import sys

from betterhalf.tasks.math_equal import equivalent
from betterhalf.tasks.worker_limits import bound_memory

WORKER_MEMORY_BYTES = 4 * 2**30
"""Address space of a worker beyond its imports, so that 10^{10^{10}} ends in its own MemoryError, not the trainer's."""
TRIAL_START_SECONDS = 120.0
"""Time limit of a trial start, which imports the main module again."""

_READY, _BAD_MAIN, _BAD_WORKER = 90, 91, 92
"""Exit statuses of a trial start; any other comes from the main module, which may end the process."""
_TRIAL_SCRIPT = f"""
import pickle, sys, traceback
from multiprocessing import process, spawn
def attempt(function, *args, status):
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        sys.exit(status)
def start():
    from betterhalf.tasks.grader_worker import start_worker
    start_worker()
data = pickle.load(sys.stdin.buffer)
process.current_process()._inheriting = True
attempt(spawn.prepare, data, status={_BAD_MAIN})
attempt(start, status={_BAD_WORKER})
sys.exit({_READY})
"""
MAIN_MODULE_GRADES = (
    "the main module grades completions while it is imported, and each worker imports it again; "
    'move its code under `if __name__ == "__main__":`'
)
_GUARD = 'move its code under `if __name__ == "__main__":`'
_MISSING = re.compile(r"ModuleNotFoundError\b")
_ERROR_LINE = re.compile(r"^(?:[A-Za-z_][\w.]*)?(?:Error|Exception|Exit|Interrupt|Warning)\b", re.MULTILINE)


def start_worker() -> None:
    """Leave interrupts to the parent, warm up the comparison before any time limit runs, and limit the memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    equivalent("3", "6/2")
    bound_memory(WORKER_MEMORY_BYTES)


def why_workers_fail() -> str | None:
    """Start a worker again with its output captured; return the problem and its fix, or None if it starts.

    As in `multiprocessing`, the main module is imported under another name.
    """
    data = multiprocessing.spawn.get_preparation_data("trial start")
    data.pop("authkey", None)  # a secret that cannot be pickled
    command = [sys.executable, "-c", _TRIAL_SCRIPT]
    try:
        done = subprocess.run(
            command, input=pickle.dumps(data), capture_output=True, timeout=TRIAL_START_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing the main module again takes a worker more than {TRIAL_START_SECONDS:g} s; {_GUARD}"
    if done.returncode == _READY:
        return None
    return _fault(done.returncode, _last_error_of(done.stderr.decode(errors="replace")))


def _fault(status: int, error: str) -> str:
    """Return the problem and its fix, by the observed cause."""
    if MAIN_MODULE_GRADES in error:
        return MAIN_MODULE_GRADES
    if _MISSING.match(error):
        return f"the grader's workers cannot start ({error}); install the package that is missing"
    if status == _BAD_WORKER:
        return f"the grader's workers cannot start ({error}); check that `import math_verify` works in this environment"
    cause = error if status == _BAD_MAIN else f"it ends with status {status}"
    return f"the grader's workers cannot import the main module again ({cause}); {_GUARD}"


def last_error(error: BaseException) -> str:
    """Return the last line of an error's traceback."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last_error_of(messages: str) -> str:
    """Return the last error in a process's output, on one line."""
    found = [match.start() for match in _ERROR_LINE.finditer(messages)]
    lines = messages[found[-1] :] if found else next(iter(messages.strip().splitlines()[-1:]), "")
    return " ".join(lines.split())[:600].rstrip(".")
