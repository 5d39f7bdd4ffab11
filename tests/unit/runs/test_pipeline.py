"""Order of sampling, learning and weight syncs, with and without overlap, on fakes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineError, RunError
from betterhalf.runs.assembly import Parts
from betterhalf.runs.collect import Collected
from betterhalf.runs.pipeline import OneAhead, Sampler, runs_ahead, sampling
from betterhalf.runs.progress import Progress
from betterhalf.runs.stopwatch import Stopwatch

LIMIT = 10.0
"""Seconds after which a thread that should have moved on fails the test."""


def config_for(max_staleness: int = 1, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "training": {"steps": 4, "checkpoint_every": 0},
        "pipeline": {"max_staleness": max_staleness},
        "cluster": {"backend": "ray"},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    return RunConfig.model_validate(sections)


class Rig:
    """Fakes of all parts: an engine whose weights are a version, a trainer, and a log of everything in order."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.trainer = self.engine = self
        self.events: list[str] = []
        self.loaded = 0
        """Version that the engine holds."""
        self.current = 0
        """Version of the trainer's weights."""
        self.kept: int | None = None
        self.sampling = threading.Lock()
        self.may_end = threading.Event()
        """Sampling in a thread ends once this is set."""
        self.may_end.set()
        self.started = threading.Event()
        self.fails_at: int | None = None

    def collect(self, parts: Parts, progress: Progress, clock: Stopwatch) -> Collected:
        assert cast(Any, parts) is self
        assert self.sampling.acquire(blocking=False), "two collections at once"
        try:
            step, version = progress.step + 1, self.loaded
            self.events.append(f"sample {step} at {version}")
            self.started.set()
            if threading.current_thread() is not threading.main_thread():
                assert self.may_end.wait(LIMIT)
            assert self.loaded == version, "the weights changed while the engine sampled"
            if step == self.fails_at:
                raise EngineError(f"step {step} is lost")
            assert progress.policy_version == version
            return Collected(groups=(), position=progress.position + 3, timeouts=0, policy_version=version)
        finally:
            self.sampling.release()

    def sleep(self) -> None:
        assert not self.sampling.locked(), "asleep while it samples"
        self.events.append("sleep")

    def keep_version(self) -> None:
        self.kept = self.current
        self.events.append(f"keep {self.current}")

    def sync(self) -> None:
        assert not self.sampling.locked(), "new weights while the engine samples"
        self.loaded = self.current
        self.events.append(f"sync {self.current}")

    def run(self, updates: Callable[[int], int] = lambda _: 1) -> list[tuple[int, Collected]]:
        """Run all steps as the loop does, and return (version at the start of the step, groups) of each."""
        found, progress = [], Progress()
        with sampling(cast(Parts, self), self.collect) as sampler:
            while progress.step < self.config.training.steps:
                collected, progress = self.step(sampler, progress, updates)
                found.append((self.before, collected))
        return found

    def step(self, sampler: Sampler, progress: Progress, updates: Callable[[int], int]) -> tuple[Collected, Progress]:
        step = progress.step + 1
        self.before = self.current
        collected = sampler.collect(progress, Stopwatch(torch.device("cpu")))
        if collected.policy_version != self.current:
            assert self.kept == collected.policy_version, "the mismatch would be measured at other weights"
        self.events.append(f"measure {step}")
        sampler.before_update()
        self.current += updates(step)
        sampler.settle()
        if self.current > self.before:
            self.sync()
        return collected, Progress(step=step, position=collected.position, policy_version=self.current)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [each for each in threading.enumerate() if each.name.startswith("sampling of step")]


def test_one_step_ahead_each_step_is_sampled_with_the_weights_before_the_last_update() -> None:
    rig = Rig(config_for())
    found = rig.run()

    assert [(before, collected.policy_version) for before, collected in found] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert [collected.position for _, collected in found] == [3, 6, 9, 12]
    assert "sleep" not in rig.events
    for step in range(1, 4):
        started = rig.events.index(f"sample {step + 1} at {step - 1}")
        assert rig.events.index(f"sample {step} at {max(0, step - 2)}") < started < rig.events.index(f"sync {step}")
    assert not any(event.startswith("sample 5") for event in rig.events)


def test_sampling_overlaps_learning_and_the_sync_waits_for_it() -> None:
    """The next step is in progress while this one learns, and the sync starts when it has ended."""
    rig = Rig(config_for())
    rig.may_end.clear()
    sampler = OneAhead(cast(Parts, rig), rig.collect)
    clock = Stopwatch(torch.device("cpu"))
    sampler.collect(Progress(), clock)
    rig.started.clear()
    assert rig.sampling.locked() or rig.started.wait(LIMIT)

    sampler.before_update()
    rig.current = 1
    timer = threading.Timer(0.05, rig.may_end.set)
    timer.start()
    sampler.settle()
    assert rig.may_end.is_set() and not rig.sampling.locked()
    assert clock.seconds["generate"] >= 0.04
    rig.sync()
    assert sampler.collect(Progress(step=1, position=3, policy_version=1), clock).policy_version == 0
    sampler.settle()
    timer.join()


def test_without_overlap_every_step_samples_with_the_newest_weights_and_the_engine_sleeps() -> None:
    rig = Rig(config_for(max_staleness=0))
    found = rig.run()

    assert [(before, collected.policy_version) for before, collected in found] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert rig.events[:4] == ["sample 1 at 0", "sleep", "measure 1", "sync 1"]
    assert not any(event.startswith("keep") for event in rig.events)
    assert all(collected.ahead_seconds is None for _, collected in found)


def test_skipped_updates_leave_nothing_to_sync_and_no_staleness() -> None:
    rig = Rig(config_for())
    found = rig.run(updates=lambda step: 0 if step == 2 else 2)

    assert [before - collected.policy_version for before, collected in found] == [0, 2, 0, 2]
    assert [event for event in rig.events if event.startswith("sync")] == ["sync 2", "sync 4", "sync 6"]


def test_nothing_is_sampled_ahead_across_a_checkpoint() -> None:
    """A run continued from the checkpoint samples the next step with its weights, and so must the one that goes on."""
    rig = Rig(config_for(training={"steps": 5, "checkpoint_every": 2}))
    found = rig.run()

    assert [before - collected.policy_version for before, collected in found] == [0, 1, 0, 1, 0]
    kept = [event for event in rig.events if event.startswith("keep")]
    assert kept == ["keep 0", "keep 2"]
    assert [collected.ahead_seconds == 0.0 for _, collected in found] == [True, False, True, False, True]


def test_a_step_after_which_the_best_policy_may_be_kept_counts_as_a_checkpoint() -> None:
    evaluate: dict[str, Any] = {"every": 2}
    assert not runs_ahead(config_for(evaluate=evaluate), 2)
    assert runs_ahead(config_for(evaluate=evaluate), 1)
    assert runs_ahead(config_for(evaluate={**evaluate, "keep_best": False}), 2)
    assert not runs_ahead(config_for(), 4)


def test_an_error_in_the_thread_is_raised_in_the_step_that_lost_its_completions() -> None:
    rig = Rig(config_for())
    rig.fails_at = 3
    with pytest.raises(EngineError, match="step 3 is lost"):
        rig.run()
    assert "sync 2" in rig.events and "measure 2" in rig.events
    assert "measure 3" not in rig.events


def test_an_error_while_learning_waits_for_the_sampling_and_drops_it() -> None:
    """After the context an engine may be used: a restart of the trainer loads weights into it."""
    rig = Rig(config_for())
    rig.may_end.clear()

    def dies(step: int) -> int:
        threading.Timer(0.05, rig.may_end.set).start()
        raise RunError(f"a rank died in step {step}")

    with pytest.raises(RunError, match="a rank died in step 1"):
        rig.run(updates=dies)
    assert not rig.sampling.locked()
    rig.sync()

    # From the start again: what was sampled ahead is gone.
    rig.events.clear()
    rig.kept = None
    assert len(rig.run()) == 4
    assert rig.events[0] == "sample 1 at 0"


def test_an_interrupted_run_does_not_wait_for_the_sampling() -> None:
    rig = Rig(config_for())
    rig.may_end.clear()

    def interrupted(_: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rig.run(updates=interrupted)
    assert rig.sampling.locked(), "the run waited for its thread"
    rig.may_end.set()
    for thread in threading.enumerate():
        if thread.name.startswith("sampling of step"):
            assert thread.daemon
            thread.join(LIMIT)
