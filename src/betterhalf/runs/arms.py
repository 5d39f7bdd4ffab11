"""Arms of a sanity run side by side, each in its own process with an equal share of the threads.

Two processes with one thread each, side by side, finish sooner than two processes with two threads each in sequence,
because no thread waits for another to wake up. docs/LOG.md has the measurement.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betterhalf import errors
from betterhalf.config.schema import RunConfig
from betterhalf.errors import BetterhalfError, RunError
from betterhalf.metrics import events
from betterhalf.metrics.several import SeveralRuns
from betterhalf.process import chosen_threads, usable_cores
from betterhalf.rollout.build import capabilities
from betterhalf.run_dir import RunDir
from betterhalf.runs.data_check import permission
from betterhalf.setup.device import choose_device

BYTES_PER_PARAMETER = 32
"""Estimated memory of an arm on a CPU for each parameter: FP32 masters, two Adam states and gradients (16), widened
weights of trainer and engine (8), and temporary tensors of a sync and an optimizer step (8)."""

BYTES_BESIDE = 2 * 2**30
"""Estimated memory of an arm for libraries, activations, logits and cache."""

_Lines = queue.SimpleQueue[tuple[str, str | None]]
"""(name of an arm, line of its output); None in place of the line at the end of the output."""

_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""File with the memory limit of a container."""

_MODULE = "betterhalf.runs.arm_process"
_LINES_KEPT = 15
_GRACE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmPlan:
    """Number of arms to train at the same time, and their threads."""

    at_once: int
    """Number of processes at a time; with 1 the arms train sequentially, in this process."""
    threads: int
    """Number of threads of each arm."""
    reason: str
    """Reason for the plan, in words."""

    def described(self, names: Sequence[str]) -> str:
        """Return one line for the terminal."""
        arms = " and ".join(names) if len(names) < 3 else f"{len(names)} arms"
        at_once = min(self.at_once, len(names))
        how = f"{at_once} side by side" if at_once > 1 else "sequentially" if len(names) > 1 else "alone"
        each = " each" if len(names) > 1 else ""
        return f"{arms}: {how}, {self.threads} thread{'' if self.threads == 1 else 's'}{each} ({self.reason})"


def plan_arms(config: RunConfig, count: int, parameters: int) -> ArmPlan:
    """Choose how many of `count` arms train at the same time.

    The choice depends on the machine, not on its load: it sets the threads of an arm, which set the order of sums.

    Args:
        config: configuration of the sanity run.
        count: number of arms of the run, finished ones included.
        parameters: number of parameters of the model.
    """
    threads = chosen.count if (chosen := chosen_threads()) else usable_cores()
    if config.sanity.arms_at_once:
        at_once = min(config.sanity.arms_at_once, count)
        return _plan(at_once, threads, f"sanity.arms_at_once={config.sanity.arms_at_once}")
    if choose_device(config).type != "cpu":
        return _plan(1, threads, "they share a GPU")
    if not capabilities(config).shares_cores:
        return _plan(1, threads, f"engine.type={config.engine.type} takes all cores")
    if (fit := _fit_in_memory(parameters)) < min(count, threads):
        return _plan(max(1, fit), threads, "as many as fit into memory")
    return _plan(min(count, threads), threads, f"{threads} thread{'' if threads == 1 else 's'} in all")


def _plan(at_once: int, threads: int, reason: str) -> ArmPlan:
    at_once = max(1, at_once)
    return ArmPlan(at_once=at_once, threads=max(1, threads // at_once), reason=reason)


def _fit_in_memory(parameters: int) -> int:
    """Return the number of arms that fit into the machine's memory: all of it, because free memory varies."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1
    with contextlib.suppress(OSError, ValueError):  # "max", or no control groups
        total = min(total, int(_MEMORY_LIMIT.read_text(encoding="ascii")))
    return int(0.8 * total / (parameters * BYTES_PER_PARAMETER + BYTES_BESIDE))


def train_side_by_side(
    run: RunDir, config: RunConfig, threads: Mapping[str, int], perfectible: Path, at_once: int
) -> None:
    """Train arms in their own processes and show their progress; each leaves a run folder with a summary.

    Args:
        run: folder of the sanity run, which holds its configuration.
        config: the same configuration.
        threads: names of the arms to train, each with its number of threads.
        perfectible: path of the perfectible set, on which they train.
        at_once: number of processes at a time.

    Raises:
        BetterhalfError: the error of an arm; the other arms are ended, and --resume continues all of them.
        RunError: an arm's process failed without reporting an error.
    """
    view = SeveralRuns(config.logging.console, labels=tuple(threads), total_steps=config.training.steps)
    waiting, running = deque(threads), dict[str, _Arm]()
    arrived: _Lines = queue.SimpleQueue()
    with view, _all_ended(running):
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.popleft()
                running[name] = _Arm(run, name, perfectible, threads[name], arrived, permission(config))
            name, line = arrived.get()
            if line is None:
                running.pop(name).finish()
            elif event := running[name].take(line):
                view.show(name, event)


@contextlib.contextmanager
def _all_ended(running: Mapping[str, _Arm]) -> Iterator[None]:
    """End the processes that still run when the body is left, for whatever reason."""
    try:
        yield
    finally:
        for arm in running.values():
            arm.end()


class _Arm:
    """The process that trains one arm."""

    def __init__(
        self,
        run: RunDir,
        name: str,
        perfectible: Path,
        threads: int,
        arrived: _Lines,
        overrides: Sequence[str] = (),
    ) -> None:
        """Start the process; its output goes to `arrived`, followed by None.

        The process reads its settings from `run.config`; `overrides` are those that are not recorded there.
        """
        self._name = name
        self._error: dict[str, Any] | None = None
        self._tail: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(run.path), name, str(perfectible), str(os.getpid()), *overrides],
            env={**os.environ, events.VARIABLE: "1", "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Its own process group: Ctrl-C reaches this process alone, and the arm's children end with the arm.
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(arrived,), daemon=True).start()
        threading.Thread(target=self._clear, daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id, also the id of its process group."""
        return self._process.pid

    def _read(self, arrived: _Lines) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                arrived.put((self._name, line))
        arrived.put((self._name, None))

    def _clear(self) -> None:
        """End the children that the process leaves when it ends: they keep its output open, and `_read` would wait.

        Not by SIGKILL: the resource tracker of `multiprocessing`, which ignores SIGTERM, still has to clean up.
        """
        self._process.wait()
        self._signal(signal.SIGTERM)

    def take(self, line: str) -> dict[str, Any] | None:
        """Return the event to show for a line; other lines become `output`, and are kept for an error message."""
        event = events.parse(line)
        if event is None:
            text = line.rstrip()
            self._tail.append(text)
            return {"output": text} if text else None
        if "error" in event:
            self._error = event
        return event

    def finish(self) -> None:
        """Wait for the process after the end of its output.

        Raises:
            BetterhalfError: the error of the arm.
            RunError: the process failed without reporting an error.
        """
        code = self._process.wait()
        if self._error is not None:
            raise _raised(self._error)
        if code:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            cause = " If memory ran out, set sanity.arms_at_once=1." if code == -signal.SIGKILL else ""
            output = "\n".join(f"  {line}" for line in self._tail) or "  (no output)"
            raise RunError(
                f"the process of the arm {self._name} ended with {how}; --resume continues from its last checkpoint."
                f"{cause} Its output ends with:\n{output}"
            )

    def end(self) -> None:
        """End the process and its group, by SIGTERM and then by SIGKILL; harmless if it has ended."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process group, if any of it is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _raised(event: Mapping[str, Any]) -> Exception:
    """Return the error of an arm as it would have been raised in this process."""
    if event["error"] == "OSError":
        return OSError(event["errno"], event["message"], event["filename"])
    kind = getattr(errors, str(event["error"]), RunError)
    assert issubclass(kind, BetterhalfError)
    return kind(event["message"])
