"""Sampling of the next step while the trainer learns this one, with `pipeline.max_staleness = 1`.

    loop      | collect k | measure and learn k        | settle | sync, record | collect k+1 | ...
    thread                |======= sample k+1 =======|                                      |== sample k+2 ...

An engine never changes its weights while it samples: before each sync the loop waits for the collection in progress,
and the next collection starts after it. Nothing is sampled ahead across a checkpoint: the step after one is sampled
with the newest weights, so a run that continues from it repeats the same steps, bit for bit, and a checkpoint holds
neither completions nor a second set of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from typing import Protocol

import torch

from betterhalf.config.schema import RunConfig
from betterhalf.runs.assembly import Parts
from betterhalf.runs.collect import Collected
from betterhalf.runs.due import checkpoint_possible
from betterhalf.runs.progress import Progress
from betterhalf.runs.stopwatch import Stopwatch

Collect = Callable[[Parts, Progress, Stopwatch], Collected]
"""(parts, position of the run, stopwatch) -> groups of the step after that position."""


class Sampler(Protocol):
    """Source of the rollout groups of each step, in order."""

    def collect(self, progress: Progress, clock: Stopwatch) -> Collected:
        """Return the groups of the step after `progress`, and start those of the next step where that is allowed.

        Args:
            progress: position of the run; its policy version is that of the engine's and the trainer's weights.
            clock: records the seconds that the step waits for sampling and grading.

        Raises:
            RunError: whatever ended the collection; see `sample_groups`.
        """
        ...

    def before_update(self) -> None:
        """Note that the trainer's weights are about to change: everything at the weights so far has been measured."""
        ...

    def settle(self) -> None:
        """Wait until no engine samples, so that it may be used and its weights replaced; what it sampled is kept."""
        ...

    def close(self) -> None:
        """Discard what has been sampled ahead, without waiting; calling it twice is harmless."""
        ...


class InStep:
    """Sampler without overlap: each step samples with the newest weights, and the engine sleeps during the update."""

    def __init__(self, parts: Parts, collect: Collect) -> None:
        """Call `collect` once for each step."""
        self._parts = parts
        self._collect = collect

    def collect(self, progress: Progress, clock: Stopwatch) -> Collected:
        """See `Sampler.collect`."""
        collected = self._collect(self._parts, progress, clock)
        self._parts.engine.sleep()
        return collected

    def before_update(self) -> None:
        """Do nothing: no weights have to be kept, because no other step is being sampled."""

    def settle(self) -> None:
        """Do nothing: nothing is in progress between two calls of `collect`."""

    def close(self) -> None:
        """Do nothing: nothing is sampled ahead."""


class OneAhead:
    """Sampler that collects the next step in a thread while the trainer learns; the engines never sleep.

    The thread uses the engine and the task, which the loop leaves alone until `settle` returns. Only one thread runs at
    a time.
    """

    def __init__(self, parts: Parts, collect: Collect) -> None:
        """Call `collect` once for each step; for most of them in a thread of its own, one step early."""
        self._parts = parts
        self._collect = collect
        self._ahead: _Ahead | None = None
        self._clock: Stopwatch | None = None

    def collect(self, progress: Progress, clock: Stopwatch) -> Collected:
        """See `Sampler.collect`; an error in the thread is raised here, in the step whose completions it lost."""
        self._clock = clock
        collected = self._taken(progress, clock)
        step = progress.step + 1
        if runs_ahead(self._parts.config, step):
            self._ahead = _Ahead(self._parts, self._collect, replace(progress, step=step, position=collected.position))
        return collected

    def _taken(self, progress: Progress, clock: Stopwatch) -> Collected:
        """Return the groups that were sampled ahead for this step, or sample them now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return replace(self._collect(self._parts, progress, clock), ahead_seconds=0.0)
        with clock("generate"):
            ahead.wait()
        return ahead.result()

    def before_update(self) -> None:
        """Keep the weights that sample the step in progress: its mismatch is measured at them, after the update."""
        if self._ahead is not None:
            self._parts.trainer.keep_version()

    def settle(self) -> None:
        """See `Sampler.settle`; the wait counts as `time/generate_seconds` of the step that waits."""
        if self._ahead is None or self._clock is None:
            return
        with self._clock("generate"):
            self._ahead.wait()

    def close(self) -> None:
        """See `Sampler.close`."""
        self._ahead = None


class _Ahead:
    """Collection of one step in a thread."""

    def __init__(self, parts: Parts, collect: Collect, start: Progress) -> None:
        """Start to collect the step after `start`."""
        self._parts = parts
        self._collect = collect
        self._start = start
        self._found: Collected | BaseException | None = None
        # A daemon, because an interrupted run must not wait for it; a run that fails waits in `sampling`.
        self._thread = Thread(target=self._run, name=f"sampling of step {start.step + 1}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # A stopwatch for the CPU: one for the GPU would also wait for the trainer, which works on another step.
        clock = Stopwatch(torch.device("cpu"))
        try:
            self._found = replace(self._collect(self._parts, self._start, clock), ahead_seconds=clock.total())
        except BaseException as error:
            self._found = error

    def wait(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def result(self) -> Collected:
        """Return the groups after `wait`, or raise what ended the collection."""
        if isinstance(self._found, Collected):
            return self._found
        assert self._found is not None, "wait() comes first"
        raise self._found


def runs_ahead(config: RunConfig, step: int) -> bool:
    """Return whether the next step is sampled while the trainer learns `step`, with `pipeline.max_staleness = 1`.

    It is not if a checkpoint may follow `step`.
    """
    return step < config.training.steps and not checkpoint_possible(config, step)


@contextmanager
def sampling(parts: Parts, collect: Collect) -> Iterator[Sampler]:
    """Provide the sampler that `pipeline.max_staleness` asks for.

    After an error it waits for the sampling in progress, so that the engine may be used again; an interrupted run does
    not wait.

    Args:
        parts: engine, task, trainer and settings.
        collect: samples and grades one step.
    """
    sampler: Sampler = OneAhead(parts, collect) if parts.config.pipeline.max_staleness else InStep(parts, collect)
    try:
        yield sampler
    except Exception:
        sampler.settle()
        raise
    finally:
        sampler.close()
