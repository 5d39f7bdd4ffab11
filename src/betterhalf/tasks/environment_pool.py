"""Worker processes in which an environment of the user's own runs, with a time limit for each call."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from betterhalf.errors import RewardError
from betterhalf.tasks import environment_worker as worker
from betterhalf.tasks.turns import Failure

START_SECONDS = 120.0
"""Time limit of starting a worker, which imports the user's module."""


class EnvironmentPool:
    """Workers that start with the first call and run until `close`; one that hangs or crashes is replaced."""

    def __init__(self, path: str, settings: Mapping[str, Any], *, seconds: float, workers: int) -> None:
        """Create the pool, without starting its workers.

        Args:
            path: import path of the class.
            settings: keyword arguments with which it is created.
            seconds: time limit of a call.
            workers: number of processes.
        """
        self._start = (path, dict(settings))
        self._seconds, self._workers = seconds, workers
        self._pool: ProcessPool | None = None
        self.timeouts = 0
        """Number of calls so far that ran out of time."""

    def start(self) -> None:
        """Start a worker, so that an environment that cannot run is found before anything is sampled.

        Raises:
            RewardError: no worker can start, or none can create the environment.
        """
        try:
            future = self._schedule(worker.ready, (), None)
            if not wait([future], START_SECONDS, FIRST_COMPLETED).done:
                raise RewardError(f"{self._name} does not start in a worker process within {START_SECONDS:g} s")
            result = self._result(future)
        except BaseException:
            self.close()
            raise
        if isinstance(result, Failure):
            self.close()
            raise RewardError(f"{self._name} cannot be created in a worker process: {result.message}")

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the result of each call in a worker, or its `Failure`.

        Raises:
            RewardError: no worker can start.
        """
        if calls and self._pool is None:
            self.start()
        try:
            return self._results(function, calls)
        except BrokenProcessPool:  # an idle worker was killed from outside: try once more
            self.close()
            self.start()
        try:
            return self._results(function, calls)
        except BrokenProcessPool as error:
            self.close()
            raise RewardError(f"the workers of {self._name} ended twice without a result ({error})") from error

    def close(self) -> None:
        """Stop the workers, even busy ones."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    @property
    def _name(self) -> str:
        return f"task.environment={self._start[0]}"

    def _results(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        futures = [self._schedule(function, call, self._seconds) for call in calls]
        return [self._result(future) for future in futures]

    def _schedule(
        self, function: Callable[..., Any], call: tuple[Any, ...], seconds: float | None
    ) -> ProcessFuture[Any]:
        if self._pool is None:
            if getattr(multiprocessing.current_process(), "_inheriting", False):
                raise RewardError(
                    f"the main module runs {self._name} while it is imported, and each worker imports it again; move "
                    'its code under `if __name__ == "__main__":`'
                )
            # spawn: a fork of a process with torch's threads can deadlock.
            self._pool = ProcessPool(
                max_workers=self._workers,
                initializer=worker.start_worker,
                initargs=self._start,
                context=multiprocessing.get_context("spawn"),
            )
        try:
            return self._pool.schedule(function, args=call, timeout=seconds)
        except RuntimeError as error:  # pebble raises this if a pool broke between two batches
            raise BrokenProcessPool(str(error)) from error

    def _result(self, future: ProcessFuture[Any]) -> Any:
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, FutureTimeoutError):
            self.timeouts += 1
            return Failure(message=f"no result within {self._seconds:g} s (task.time_limit)")
        if isinstance(error, ProcessExpired):
            return Failure(message=f"its process ended with exit status {error.exitcode}")
        if isinstance(error, BrokenProcessPool):
            raise error
        return Failure(message=f"{type(error).__name__}: {error}")
