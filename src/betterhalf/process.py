"""Settings of the whole process: number of threads, their waiting policy, memory pages, garbage collection.

Libraries read most of them once, when they are loaded. `OMP_NUM_THREADS`, `OMP_WAIT_POLICY` and `GOMP_SPINCOUNT` keep
the values that the environment gives them.
"""

from __future__ import annotations

import ctypes
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
from types import FrameType
from typing import Any

from betterhalf.words import counted

SPIN_COUNT = 20_000
"""Value of `GOMP_SPINCOUNT` for spinning threads: iterations of a busy loop before a waiting thread sleeps."""

SLOW_WAKE_MICROSECONDS = 5.0
"""Threads spin if waking one takes at least this long; at 12 us, spinning makes a step of the demo a fifth faster
(docs/LOG.md)."""

_ROUND_TRIPS = 200
_LOAD_SECONDS = 0.1
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
"""Signals whose handlers raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """Number of threads of a process, and their waiting policy."""

    count: int
    """Number of threads that compute."""
    waiting: str
    """`spin` (briefly, then sleep), `sleep` (at once), or `as set` by the environment or by torch."""
    wake_microseconds: float | None
    """Time to wake a sleeping thread on another processor; None if not measured."""
    idle_cores: float | None
    """Number of idle physical cores at the start; None if not measured."""
    reason: str
    """Reason for the waiting policy, in words."""

    def __str__(self) -> str:
        """Describe the choice in one line."""
        return f"{counted(self.count, 'thread')}, waiting: {self.waiting} ({self.reason})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


_chosen: Threads | None = None


def prepare_process() -> Threads:
    """Choose the number of threads and their waiting policy, once per process; call it before torch is imported.

    The number of threads depends on the machine alone, because it determines the order of sums and therefore every bit
    of the results. The waiting policy changes no bit, so a measurement of a tenth of a second chooses it. Waking a
    sleeping thread took 12 and 63 us on two machines, longer than a small operation; a spinning thread starts at once,
    but keeps its core from other processes. Threads therefore spin only if waking is slow and the cores are idle.

    It also makes torch ask for large memory pages: Linux otherwise hands out every large temporary tensor in pages of
    4 KiB. docs/LOG.md has the measurements.
    """
    global _chosen
    if _chosen is None:
        late = "torch" in sys.modules
        _chosen = _too_late() if late else choose_threads(os.environ)
        for name, value in {} if late else variables(_chosen).items():
            os.environ.setdefault(name, value)
    return _chosen


def variables(threads: Threads) -> dict[str, str]:
    """Return the environment variables that put a choice into effect."""
    spin = SPIN_COUNT if threads.waiting == "spin" else 0
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(spin)}
    return {
        "OMP_NUM_THREADS": str(threads.count),
        **(waiting if threads.waiting in ("spin", "sleep") else {}),
        "THP_MEM_ALLOC_ENABLE": "1",
    }


def chosen_threads() -> Threads | None:
    """Return the choice of `prepare_process`; None in a process that did not call it, such as a notebook."""
    return _chosen


def choose_threads(environment: Mapping[str, str]) -> Threads:
    """Measure the machine and return the choice; `environment` is read, not changed."""
    count = _thread_count(environment)
    if count == 1:
        return _threads(1, "sleep", "a single thread never waits for others")
    if any(environment.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return _threads(count, "as set", "the environment sets OMP_WAIT_POLICY or GOMP_SPINCOUNT")
    idle, wake = idle_cores(), wake_microseconds()
    if wake is None or idle is None:
        return _threads(count, "sleep", "idle cores or wake-up times cannot be measured here", wake, idle)
    measured = f"waking a thread takes {wake:.0f} us here, and {idle:.1f} cores were idle at the start"
    spin = wake >= SLOW_WAKE_MICROSECONDS and idle >= count - 0.5
    return _threads(count, "spin" if spin else "sleep", measured, wake, idle)


def _too_late() -> Threads:
    torch = sys.modules["torch"]
    return _threads(torch.get_num_threads(), "as set", "torch was loaded before the choice")


def _threads(count: int, waiting: str, reason: str, wake: float | None = None, idle: float | None = None) -> Threads:
    return Threads(count=count, waiting=waiting, wake_microseconds=wake, idle_cores=idle, reason=reason)


def _thread_count(environment: Mapping[str, str]) -> int:
    wanted = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else usable_cores()


def usable_cores() -> int:
    """Return the number of physical cores in the process's affinity, limited by its container's quota (rounded up)."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    quota = _quota()
    cores = len({_siblings(cpu) for cpu in cpus})
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _siblings(cpu: int) -> str:
    """Return Linux's list of the logical processors that share a core with `cpu`; `cpu` alone without such a list."""
    with suppress(OSError):
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    return str(cpu)


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Return the number of cores that the control group allows; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = file.read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def idle_cores(seconds: float = _LOAD_SECONDS) -> float | None:
    """Measure the mean number of idle physical cores over `seconds`, among those this process may use.

    A core is as idle as the busiest of its logical processors. None where Linux's /proc/stat is missing.
    """
    before = _core_times()
    time.sleep(seconds)
    after = _core_times()
    if not before or not after:
        return None
    shares: dict[str, float] = {}
    for cpu, (idle, total) in before.items():
        share = (after[cpu][0] - idle) / max(1, after[cpu][1] - total)
        core = _siblings(cpu)
        shares[core] = min(share, shares.get(core, share))
    usable = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return sum(share for core, share in shares.items() if core in usable)


def _core_times() -> dict[int, tuple[int, int]]:
    """Read (idle time, total time) of each logical processor from /proc/stat, in ticks; empty without it."""
    times = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name != "cpu":
                ticks = [int(value) for value in values[:8]]
                times[int(name[3:])] = (ticks[3] + ticks[4], sum(ticks))
    return times


def wake_microseconds(round_trips: int = _ROUND_TRIPS) -> float | None:
    """Measure the median time in which a process wakes one that sleeps on another logical processor, in microseconds.

    The time is half of the round trip of one byte through two pipes. It stands for the time to wake a thread, apart
    from effects of the scheduler. None if processes cannot be bound to processors, or if there is only one.
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
        raise OSError("the other process has ended")
    return (time.perf_counter() - started) * 1e6


def _echo(core: int, to_child: tuple[int, int], from_child: tuple[int, int]) -> None:
    """Answer each byte with a byte until the pipe closes, then end this process."""
    with suppress(BaseException):
        os.close(to_child[1])
        os.close(from_child[0])
        os.sched_setaffinity(0, {core})
        while byte := os.read(to_child[0], 1):
            os.write(from_child[1], byte)
    os._exit(0)


def end_with_parent(parent: int) -> None:
    """End this process and its group once `parent`, the process that started it, has ended.

    A thread polls, because the kernel's own signal (PR_SET_PDEATHSIG) is sent when the parent's *thread* ends, which
    may happen while the parent still runs.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`."""
_TRIM_BY_DEFAULT, _MMAPS_BY_DEFAULT = 128 * 1024, 65_536


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in this process for the next large tensor; has an effect only with glibc.

    glibc gives each allocation above 32 MiB back to Linux as soon as it is freed, and Linux clears the pages of the
    next one again. Where many passes of a model follow each other, that is a third of the CPU time (docs/LOG.md). The
    peak stays about the same; what is free at the end goes back.
    """
    library: Any = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallopt", "malloc_trim")):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MMAPS_BY_DEFAULT)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_BY_DEFAULT)
        library.malloc_trim(0)


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Exclude all objects that exist now from garbage collection.

    Models and libraries are about a million objects, and a step creates a few thousand; without this, each full
    collection goes through all of them.
    """
    if gc.get_freeze_count():
        # A caller has frozen the objects already, and will unfreeze them.
        yield
        return
    collect_garbage()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def collect_garbage() -> None:
    """Run a full garbage collection; Ctrl-C or SIGTERM during it takes effect at its end.

    Python ignores an exception that is raised in a finaliser, and with it a KeyboardInterrupt.
    """
    with _deferred_interrupt():
        gc.collect()


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Defer a SIGINT or SIGTERM that arrives in the block to its end, if the handler is a Python function."""
    arrived: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in _INTERRUPTS if _in_main_thread()}
    deferred = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in deferred:
        signal.signal(number, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in deferred.items():
            signal.signal(number, handler)
    for last, frame in arrived[-1:]:
        deferred[signal.Signals(last)](last, frame)


class Terminated(KeyboardInterrupt):
    """SIGTERM asked this process to end. Code that handles Ctrl-C handles it too, and keeps what is finished."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the block, as Ctrl-C raises KeyboardInterrupt.

    Later ones are ignored until the end of the block, so that they do not interrupt the cleanup. Nothing changes if the
    caller has set a handler of its own, or outside the main thread, because only that one handles signals.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    arrived = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        if not arrived:
            arrived = True
            raise Terminated("ended by SIGTERM")

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
