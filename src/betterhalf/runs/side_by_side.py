"""Several runs side by side, such as the arms of a sanity run: worker processes with an equal share of the threads.

A worker carries out one job after another, because importing torch takes seconds.

Two processes with one thread each, side by side, finish sooner than two processes with two threads each in sequence,
because no thread waits for another to wake up. docs/LOG.md has the measurement.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betterhalf import errors
from betterhalf.cluster.build import backend_of
from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.errors import BetterhalfError, RunError
from betterhalf.metrics import events
from betterhalf.precision.device import choose_device
from betterhalf.process import chosen_threads, usable_cores
from betterhalf.rollout.build import capabilities
from betterhalf.types import JobKind
from betterhalf.words import counted

BYTES_PER_PARAMETER = 32
"""Estimated memory of a run on a CPU for each parameter: FP32 masters, two Adam states and gradients (16), widened
weights of trainer and engine (8), and temporary tensors of a sync and an optimizer step (8)."""

BYTES_BESIDE = 2 * 2**30
"""Estimated memory of a run for libraries, activations, logits and cache."""

_Lines = queue.SimpleQueue[tuple["_Worker", str | None]]
"""(a worker, line of its output); None in place of the line at the end of the output."""

_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""File with the memory limit of a container."""

_MODULE = "betterhalf.runs.job_process"
_LAST = {"error", "finished"}
"""Keys of the last event of a job."""

_JOBS_PER_PROCESS = 10
"""Number of jobs after which a worker is replaced: the allocator keeps some 50 MB more after each run of the demo."""

_LINES_KEPT = 15
_GRACE_SECONDS = 30.0
"""Time that a worker gets to end what its job has started, such as its own Ray; an idle one ends at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Number of runs at the same time, and their threads."""

    at_once: int
    """Number of processes at a time; with 1 there is no need for a process of its own."""
    threads: int
    """Number of threads of each run."""
    reason: str
    """Reason for the plan, in words."""

    def described(self, names: Sequence[str], noun: str = "arms") -> str:
        """Return one line for the terminal."""
        runs = " and ".join(names) if len(names) < 3 else f"{len(names)} {noun}"
        at_once = min(self.at_once, len(names))
        how = f"{at_once} side by side" if at_once > 1 else "sequentially" if len(names) > 1 else "alone"
        each = " each" if len(names) > 1 else ""
        return f"{runs}: {how}, {counted(self.threads, 'thread')}{each} ({self.reason})"


def plan_runs(config: RunConfig, count: int, parameters: int, *, wanted: int, key: str) -> Plan:
    """Choose how many of `count` runs train at the same time.

    The choice depends on the machine, not on its load: it sets the threads of a run, which set the order of sums.

    Args:
        config: configuration of one of the runs; gives device and engine.
        count: number of runs, finished ones included.
        parameters: number of parameters of the largest model.
        wanted: number of runs at a time that the user asked for; 0 to choose.
        key: the setting of `wanted`.
    """
    threads = chosen.count if (chosen := chosen_threads()) else usable_cores()
    if wanted:
        return _plan(min(wanted, count), threads, f"{key}={wanted}")
    if not backend_of(config).computes_here:
        return _plan(1, threads, "each has the whole cluster")
    if choose_device(config).type != "cpu":
        return _plan(1, threads, "they share a GPU")
    if not capabilities(config).shares_cores:
        return _plan(1, threads, f"engine.type={config.engine.type} takes all cores")
    if (fit := _fit_in_memory(parameters)) < min(count, threads):
        return _plan(max(1, fit), threads, "as many as fit into memory")
    return _plan(min(count, threads), threads, f"{counted(threads, 'thread')} in all")


def _plan(at_once: int, threads: int, reason: str) -> Plan:
    at_once = max(1, at_once)
    return Plan(at_once=at_once, threads=max(1, threads // at_once), reason=reason)


def _fit_in_memory(parameters: int) -> int:
    """Return the number of runs that fit into the machine's memory: all of it, because free memory varies."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1
    with contextlib.suppress(OSError, ValueError):  # "max", or no control groups
        total = min(total, int(_MEMORY_LIMIT.read_text(encoding="ascii")))
    return int(0.8 * total / (parameters * BYTES_PER_PARAMETER + BYTES_BESIDE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run for a worker process; it leaves a run folder with a summary."""

    kind: JobKind
    """Kind of the run, which decides what the worker does with it."""
    name: str
    """Name of the run, its label on the terminal."""
    config: RunConfig
    """Complete configuration of the run."""
    folder: Path
    """Its run folder."""
    threads: int
    """Number of threads."""

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}"

    def line(self) -> str:
        """Return the job as a line of JSON, the input of a worker."""
        config = resolved_json(self.config)
        return json.dumps({"kind": self.kind, "name": self.name, "folder": str(self.folder), "config": config}) + "\n"


def run_jobs(
    jobs: Sequence[Job],
    show: Callable[[Job, dict[str, Any]], None],
    *,
    at_once: int,
    limit_key: str,
    failed: Callable[[Job, Exception], None],
    finished: Callable[[Job], None] = lambda job: None,
) -> None:
    """Carry out jobs in worker processes, in order, and report their progress.

    Args:
        jobs: the jobs.
        show: called with each event of a job, and with each line of its output as the event `output`.
        at_once: number of processes at a time.
        limit_key: the setting that lowers `at_once`, for messages.
        failed: called with the error of a job. If it raises, all workers are ended; otherwise the other jobs go on.
        finished: called after each job without an error.
    """
    waiting, running = list(jobs), list[_Worker]()
    arrived: _Lines = queue.SimpleQueue()
    with _all_ended(running):
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Worker(waiting.pop(0), arrived, limit_key))
            worker, line = arrived.get()
            event = worker.take(line)
            if line is None:
                running.remove(worker)
            if event is None or (job := worker.job) is None:
                continue
            if not event.keys() & _LAST:
                show(job, event)
                continue
            worker.job = None
            failed(job, _raised(event)) if "error" in event else finished(job)
            if line is not None:
                worker.give(None if worker.spent else _next(waiting, worker.threads))


def _next(waiting: list[Job], threads: int) -> Job | None:
    """Take the next job with this number of threads, which a process cannot change; None without one."""
    for index, job in enumerate(waiting):
        if job.threads == threads:
            return waiting.pop(index)
    return None


@contextlib.contextmanager
def _all_ended(running: Sequence[_Worker]) -> Iterator[None]:
    """End the processes that still run when the body is left, for whatever reason."""
    try:
        yield
    finally:
        for worker in running:
            worker.ask_to_end()
        for worker in running:
            worker.end()


class _Worker:
    """A process that carries out jobs with one number of threads."""

    def __init__(self, job: Job, arrived: _Lines, limit_key: str) -> None:
        """Start the process with a first job; its output goes to `arrived`, followed by None."""
        self.job: Job | None = None
        """The job that it carries out; None if it has none."""
        self.threads = job.threads
        self._given = 0
        self._limit_key = limit_key
        self._tail: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(os.getpid())],
            env={**os.environ, events.VARIABLE: "1", "OMP_NUM_THREADS": str(job.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Its own process group: Ctrl-C reaches this process alone, and the worker's children end with the worker.
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(arrived,), daemon=True).start()
        threading.Thread(target=self._clear, daemon=True).start()
        self.give(job)

    @property
    def spent(self) -> bool:
        """True after as many jobs as a process may carry out."""
        return self._given >= _JOBS_PER_PROCESS

    @property
    def pid(self) -> int:
        """Process id, also the id of its process group."""
        return self._process.pid

    def give(self, job: Job | None) -> None:
        """Send the next job, or the end of the input, after which the process ends."""
        self.job = job
        if job is None:
            self._close_input()
            return
        self._given += 1
        assert self._process.stdin is not None
        # A process that has ended reads nothing; the end of its output says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(job.line())
            self._process.stdin.flush()

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a part of a job that nobody has read
            self._process.stdin.close()

    def _read(self, arrived: _Lines) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                arrived.put((self, line))
        arrived.put((self, None))

    def _clear(self) -> None:
        """End the children that the process leaves when it ends: they keep its output open, and `_read` would wait.

        Not by SIGKILL: the resource tracker of `multiprocessing`, which ignores SIGTERM, still has to clean up.
        """
        self._process.wait()
        self._signal(signal.SIGTERM)

    def take(self, line: str | None) -> dict[str, Any] | None:
        """Return the event in a line; other lines become `output`, and are kept for an error message.

        The end of the output is an error if a job is unfinished.
        """
        if line is None:
            return self._ended()
        event = events.parse(line)
        if event is None:
            text = line.rstrip()
            self._tail.append(text)
            return {"output": text} if text else None
        return event

    def _ended(self) -> dict[str, Any] | None:
        """Return an error for the unfinished job of a process that has ended; None without such a job."""
        code = self._process.wait()
        self._close_input()
        if self.job is None:
            return None
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        cause = f" If memory ran out, set {self._limit_key}=1." if code == -signal.SIGKILL else ""
        output = "".join(f"\n  {line}" for line in self._tail)
        message = (
            f"the process of {self.job} ended with {how}; --resume continues from its last checkpoint.{cause}"
            f"{f' Its output ends with:{output}' if output else ''}"
        )
        return {"error": "RunError", "message": message}

    def ask_to_end(self) -> None:
        """Send SIGTERM to the process, without waiting; it ends what it has started."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def end(self) -> None:
        """Ask the process to end, wait for it, and end what is left of its group by SIGKILL."""
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._close_input()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process group, if any of it is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _raised(event: Mapping[str, Any]) -> Exception:
    """Return the error of a job as it would have been raised in this process."""
    if event["error"] == "OSError":
        return OSError(event["errno"], event["message"], event["filename"])
    kind = getattr(errors, str(event["error"]), RunError)
    assert issubclass(kind, BetterhalfError)
    return kind(event["message"])
