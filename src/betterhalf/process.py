"""Settings of the process that libraries read when they are loaded: threads, how they wait, memory, garbage.

What the environment sets already stays: `OMP_NUM_THREADS`, `OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPIN_COUNT = 20_000
"""Turns that a waiting thread spins before it sleeps, as `GOMP_SPINCOUNT`."""

SLOW_WAKE_MICROSECONDS = 5.0
"""Threads spin where waking takes at least this long; at 12 us a step of the demo gains a fifth (docs/LOG.md)."""

_ROUND_TRIPS = 200
_LOAD_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """The threads of one process, and how they wait for work."""

    count: int
    """Threads that compute."""
    waiting: str
    """`spin` (briefly, then sleep), `sleep` (at once), or `as set` by somebody else."""
    wake_microseconds: float | None
    """Time to wake a sleeping thread on another core; None where it was not measured."""
    idle_cores: float | None
    """Cores that were idle at the start; None where it was not measured."""
    reason: str
    """Why it waits this way."""

    def __str__(self) -> str:
        """One line for people."""
        plural = "" if self.count == 1 else "s"
        return f"{self.count} thread{plural}, waiting: {self.waiting} ({self.reason})"

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


_chosen: Threads | None = None


def prepare_process() -> Threads:
    """Choose the threads of this process and how they wait, once; call it before torch is imported.

    The number of threads depends on the machine alone, since the order of sums, and with it every bit, depends on that
    number. How they wait changes no bit, so it is chosen by a measurement of a tenth of a second: a thread that sleeps
    took 12 and 63 us to wake on two machines, longer than a small operation takes; a thread that spins is there
    at once, but takes the core from whatever else runs. So threads spin only where waking is slow and the cores are
    idle.

    Linux also gives out the memory of every large temporary tensor in pages of 4 KiB, unless torch asks for large ones.
    docs/LOG.md has all of this measured.
    """
    global _chosen
    if _chosen is None:
        late = "torch" in sys.modules
        _chosen = _too_late() if late else choose_threads(os.environ)
        for name, value in {} if late else variables(_chosen).items():
            os.environ.setdefault(name, value)
    return _chosen


def variables(threads: Threads) -> dict[str, str]:
    """The environment variables that make a process run as chosen."""
    spin = SPIN_COUNT if threads.waiting == "spin" else 0
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(spin)}
    return {
        "OMP_NUM_THREADS": str(threads.count),
        **(waiting if threads.waiting in ("spin", "sleep") else {}),
        "THP_MEM_ALLOC_ENABLE": "1",
    }


def chosen_threads() -> Threads | None:
    """Return the choice of `prepare_process`; None in a process that never called it, such as a notebook."""
    return _chosen


def choose_threads(environment: Mapping[str, str]) -> Threads:
    """Measure the machine and choose; `environment` is read, not changed."""
    count = _thread_count(environment)
    if count == 1:
        return _threads(1, "sleep", "a single thread waits for nobody")
    if any(environment.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return _threads(count, "as set", "OMP_WAIT_POLICY or GOMP_SPINCOUNT is in the environment")
    idle, wake = idle_cores(), wake_microseconds()
    if wake is None or idle is None:
        return _threads(count, "sleep", "this system does not tell how busy it is", wake, idle)
    measured = f"waking a thread takes {wake:.0f} us here, and {idle:.1f} cores were idle at the start"
    spin = wake >= SLOW_WAKE_MICROSECONDS and idle >= count - 0.5
    return _threads(count, "spin" if spin else "sleep", measured, wake, idle)


def _too_late() -> Threads:
    torch = sys.modules["torch"]
    return _threads(torch.get_num_threads(), "as set", "torch was loaded before there was a choice")


def _threads(count: int, waiting: str, reason: str, wake: float | None = None, idle: float | None = None) -> Threads:
    return Threads(count=count, waiting=waiting, wake_microseconds=wake, idle_cores=idle, reason=reason)


def _thread_count(environment: Mapping[str, str]) -> int:
    wanted = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else usable_cores()


def usable_cores() -> int:
    """Physical cores this process may use: those of its affinity, at most the quota of its container, rounded up."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    quota = _quota()
    cores = len({_siblings(cpu) for cpu in cpus})
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _siblings(cpu: int) -> str:
    """The logical processors of one physical core, as Linux lists them; the processor alone where it does not."""
    with suppress(OSError):
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    return str(cpu)


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores that the control group grants; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = file.read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def idle_cores(seconds: float = _LOAD_SECONDS) -> float | None:
    """Cores without work, on average over `seconds`, among those this process may use; None where nobody tells."""
    before = _core_times()
    time.sleep(seconds)
    after = _core_times()
    if not before or not after:
        return None
    return sum((after[core][0] - before[core][0]) / max(1, after[core][1] - before[core][1]) for core in before)


def _core_times() -> dict[int, tuple[int, int]]:
    """Core -> (idle time, time), in ticks, from /proc/stat."""
    times = {}
    with suppress(OSError, ValueError, AttributeError):
        wanted = os.sched_getaffinity(0)
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in wanted:
                ticks = [int(value) for value in values[:8]]
                times[int(name[3:])] = (ticks[3] + ticks[4], sum(ticks))
    return times


def wake_microseconds(round_trips: int = _ROUND_TRIPS) -> float | None:
    """Median time for one process to wake another that sleeps on another core, in microseconds.

    Half of a round trip of one byte through two pipes: what waking a thread costs, less what the scheduler makes of
    it. None where processes cannot be bound to cores, or with a single core.
    """
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return None
    ours, theirs, *_ = sorted(allowed := os.sched_getaffinity(0))
    to_child, from_child = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _echo(theirs, to_child, from_child)
    try:
        os.close(to_child[0])
        os.close(from_child[1])
        os.sched_setaffinity(0, {ours})
        return statistics.median(_round_trip(to_child[1], from_child[0]) for _ in range(round_trips)) / 2
    except OSError:
        return None
    finally:
        os.sched_setaffinity(0, allowed)
        os.close(to_child[1])
        os.close(from_child[0])
        os.waitpid(child, 0)


def _round_trip(out: int, back: int) -> float:
    started = time.perf_counter()
    os.write(out, b"?")
    if not os.read(back, 1):
        raise OSError("the other end is gone")
    return (time.perf_counter() - started) * 1e6


def _echo(core: int, to_child: tuple[int, int], from_child: tuple[int, int]) -> None:
    """Answer each byte with a byte until the pipe closes, then end this process; never returns."""
    with suppress(BaseException):
        os.close(to_child[1])
        os.close(from_child[0])
        os.sched_setaffinity(0, {core})
        while byte := os.read(to_child[0], 1):
            os.write(from_child[1], byte)
    os._exit(0)


def end_with_parent(parent: int) -> None:
    """End this process and its group when the process `parent`, which started it, is gone.

    A thread that looks: the kernel's death signal (PR_SET_PDEATHSIG) follows the parent's *thread*, which may end
    while the parent goes on.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Keep Python's garbage collector off what exists now: models and libraries are a million objects, which it would
    look through again and again while a step makes some thousands."""
    if gc.get_freeze_count():
        # Somebody else has done it, and will undo it.
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
