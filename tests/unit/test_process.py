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
from betterhalf.process import Threads, choose_threads, frozen_gc, variables

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


def test_existing_objects_are_frozen_and_unfrozen_once() -> None:
    before = gc.get_freeze_count()
    with frozen_gc():
        frozen = gc.get_freeze_count()
        assert frozen > before
        with frozen_gc():
            assert gc.get_freeze_count() == frozen
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == before == 0


class InterruptsWhenCollected:
    """Garbage, in a circle, whose finaliser receives a Ctrl-C."""

    def __init__(self) -> None:
        self.circle = self

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        # Handlers run between two instructions of Python, so within the finaliser.
        sum(1 for _ in range(1000))


def test_an_interrupt_in_a_finaliser_is_not_lost() -> None:
    gc.disable()  # an automatic collection would swallow the interrupt
    try:
        InterruptsWhenCollected()
        with pytest.raises(KeyboardInterrupt):
            process.collect_garbage()
    finally:
        gc.enable()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_collection_without_an_interrupt_leaves_the_handler_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    process.collect_garbage()
    assert signal.getsignal(signal.SIGINT) is before
