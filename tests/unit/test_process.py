"""Settings of the whole process: threads, their waiting policy, garbage collection."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from betterhalf import process
from betterhalf.process import (
    Terminated,
    Threads,
    choose_threads,
    freed_memory_kept,
    frozen_gc,
    sigterm_interrupts,
    variables,
)

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four idle cores on which a thread takes 60 us to wake."""
    monkeypatch.setattr(process, "usable_cores", lambda: 4)
    monkeypatch.setattr(process, "idle_cores", lambda: 3.9)
    monkeypatch.setattr(process, "wake_microseconds", lambda: 60.0)
    return monkeypatch


def test_threads_spin_where_waking_is_slow_and_the_cores_are_idle(machine: pytest.MonkeyPatch) -> None:
    chosen = choose_threads({})
    assert (chosen.count, chosen.waiting) == (4, "spin")
    assert "60 us" in str(chosen) and "3.9 cores" in str(chosen)
    assert int(variables(chosen)["GOMP_SPINCOUNT"]) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("idle_cores", 3.0), ("wake_microseconds", 2.0), ("idle_cores", None), ("wake_microseconds", None)],
)
def test_threads_sleep_on_a_busy_machine_or_where_waking_is_fast(
    machine: pytest.MonkeyPatch, name: str, value: float | None
) -> None:
    machine.setattr(process, name, lambda: value)
    chosen = choose_threads({})
    assert (chosen.count, chosen.waiting) == (4, "sleep")
    assert variables(chosen)["GOMP_SPINCOUNT"] == "0"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_a_waiting_policy_from_the_environment_is_kept(machine: pytest.MonkeyPatch, name: str) -> None:
    chosen = choose_threads({name: "1"})
    assert chosen.waiting == "as set"
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(variables(chosen))


def test_the_number_of_threads_does_not_depend_on_the_load(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(process, "idle_cores", lambda: 0.0)
    assert choose_threads({}).count == 4
    assert choose_threads({"OMP_NUM_THREADS": "3"}).count == 3
    assert choose_threads({"OMP_NUM_THREADS": "2,1"}).count == 2
    assert choose_threads({"OMP_NUM_THREADS": "many"}).count == 4


def test_a_single_thread_never_spins(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(process, "wake_microseconds", lambda: pytest.fail("there is nothing to measure"))
    assert choose_threads({"OMP_NUM_THREADS": "1"}).waiting == "sleep"


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)])
def test_the_quota_of_a_container_is_read(tmp_path: Path, text: str, cores: float | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert process._quota(file) == cores
    assert process._quota(tmp_path / "missing") is None


def test_a_quota_bounds_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_quota", lambda: 0.5)
    assert process.usable_cores() == 1


@pytest.mark.parametrize(("usable", "idle"), [({0, 1, 2, 3}, 0.1 + 0.8), ({0}, 0.1), ({1, 3}, 0.8)])
def test_a_core_is_idle_only_if_all_its_logical_processors_are(
    usable: set[int], idle: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cores of two logical processors each: 0 and 2 are on one core, 1 and 3 on the other."""
    monkeypatch.setattr(process, "_siblings", lambda cpu: f"{cpu % 2},{cpu % 2 + 2}")
    samples = iter([dict.fromkeys(range(4), (0, 0)), {0: (10, 10), 1: (10, 10), 2: (1, 10), 3: (8, 10)}])
    monkeypatch.setattr(process, "_core_times", lambda: next(samples))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable)
    assert process.idle_cores(0.0) == pytest.approx(idle)


def test_the_machine_can_be_measured() -> None:
    wake, idle = process.wake_microseconds(20), process.idle_cores(0.05)
    cores = len(os.sched_getaffinity(0))
    assert idle is not None and 0 <= idle <= cores + 0.5
    assert wake is None if cores < 2 else wake is not None and 0 < wake < 1e5
    assert len(os.sched_getaffinity(0)) == cores  # the measurement bound the process to one core, and undid it


def test_the_choice_reaches_a_process_before_torch_is_imported() -> None:
    code = (
        "import os; from betterhalf.process import prepare_process; chosen = prepare_process(); import torch; "
        "assert prepare_process() is chosen; print(chosen.count, torch.get_num_threads(), os.environ['GOMP_SPINCOUNT'])"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "2"},
    )
    count, torch_count, spin = ended.stdout.split()
    assert count == torch_count == "2"
    assert spin in ("0", str(process.SPIN_COUNT))


def test_nothing_changes_after_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = dict(os.environ)
    monkeypatch.setattr(process, "_chosen", None)
    chosen = process.prepare_process()
    assert chosen.waiting == "as set"
    assert chosen.count == torch.get_num_threads()
    assert dict(os.environ) == before


def test_a_line_says_what_was_chosen() -> None:
    chosen = Threads(count=1, waiting="sleep", wake_microseconds=None, idle_cores=None, reason="because")
    assert str(chosen) == "1 thread, waiting: sleep (because)"


_FAULTS = """
import resource
from contextlib import nullcontext
import torch
from betterhalf.process import freed_memory_kept

def faults(block):
    with block:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(nullcontext()), faults(freed_memory_kept()), faults(nullcontext()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again_within_the_block_alone() -> None:
    """Twenty tensors of 64 MiB, one after the other, need the pages of one or two; outside the block those of all."""
    environment = {**os.environ, "PYTHONPATH": str(SRC), "THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, env=environment, check=True)
    before, within, after = map(int, done.stdout.split())
    assert within < 0.3 * before and after > 0.9 * before


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: object())
    done = False
    with freed_memory_kept():
        done = True
    assert done


def test_existing_objects_are_frozen_and_unfrozen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counts of frozen objects differ by what other tests' leftovers free meanwhile, so the calls are counted too.
    calls: list[str] = []
    freeze, unfreeze = gc.freeze, gc.unfreeze
    monkeypatch.setattr(process.gc, "freeze", lambda: (calls.append("freeze"), freeze()))
    monkeypatch.setattr(process.gc, "unfreeze", lambda: (calls.append("unfreeze"), unfreeze()))
    assert gc.get_freeze_count() == 0
    with frozen_gc():
        assert calls == ["freeze"] and gc.get_freeze_count() > 0
        with frozen_gc():
            pass
        assert calls == ["freeze"] and gc.get_freeze_count() > 0
    assert calls == ["freeze", "unfreeze"] and gc.get_freeze_count() == 0


class InterruptsWhenCollected:
    """Garbage, in a circle, whose finaliser receives a signal."""

    def __init__(self, number: int) -> None:
        self.circle, self.number = self, number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        # Handlers run between two instructions of Python, so within the finaliser.
        sum(1 for _ in range(1000))


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interrupt_in_a_finaliser_is_not_lost(number: int, kind: type[BaseException]) -> None:
    gc.disable()  # an automatic collection would swallow the interrupt
    try:
        InterruptsWhenCollected(number)
        with pytest.raises(kind), sigterm_interrupts():
            process.collect_garbage()
    finally:
        gc.enable()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_ends_a_block_as_ctrl_c_does_and_later_ones_wait_for_its_end() -> None:
    ended: list[str] = []
    with pytest.raises(Terminated, match="ended by SIGTERM"), sigterm_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("what was started")
    assert ended == ["what was started"]
    assert issubclass(Terminated, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_caller_stays() -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    try:
        with sigterm_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [signal.SIGTERM]


def test_a_collection_without_an_interrupt_leaves_the_handler_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    process.collect_garbage()
    assert signal.getsignal(signal.SIGINT) is before
