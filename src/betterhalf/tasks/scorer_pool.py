"""Worker processes that score completions one at a time, each within a time limit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from betterhalf.errors import RewardError
from betterhalf.tasks.grader_worker import MAIN_MODULE_GRADES, last_error


class OutOfResourcesError(Exception):
    """A call ran out of time or memory, or crashed its worker."""


class ScorerPool:
    """Pool of worker processes; those that exceed the time limit or crash are replaced.

    The workers start with the first call and run until `close`.
    """

    def __init__(self, start: Callable[..., None], arguments: tuple[Any, ...], *, seconds: float, workers: int) -> None:
        """Create the pool, without starting its workers.

        Args:
            start: called in each worker before its first call, without a time limit; importable by name.
            arguments: arguments of `start`.
            seconds: time limit of each call.
            workers: number of worker processes.
        """
        self._start = start
        self._arguments = arguments
        self._seconds = seconds
        self._workers = workers
        self._pool: ProcessPool | None = None

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the result of each call in a worker, or the exception that it raised; see `OutOfResourcesError`.

        A pool also breaks when an idle worker is killed from outside, so it is replaced once before this is an error.

        Raises:
            RewardError: the workers end without a result.
        """
        try:
            return self._results(function, calls)
        except BrokenProcessPool:
            self.close()
        try:
            return self._results(function, calls)
        except BrokenProcessPool as error:
            self.close()
            raise RewardError(
                f"the workers that score completions ended twice without a result ({last_error(error)}); check their "
                "messages above, and whether the machine has run out of memory"
            ) from error

    def close(self) -> None:
        """Stop the workers, even busy ones; calling it twice is harmless."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def _results(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        futures = [self._submit(function, call) for call in calls]
        return [_result(future) for future in futures]

    def _submit(self, function: Callable[..., Any], call: tuple[Any, ...]) -> ProcessFuture[Any]:
        if self._pool is None:
            if getattr(multiprocessing.current_process(), "_inheriting", False):
                raise RewardError(MAIN_MODULE_GRADES)
            # spawn: a fork of a process with torch's threads can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(
                max_workers=self._workers, initializer=self._start, initargs=self._arguments, context=context
            )
        try:
            return self._pool.schedule(function, args=call, timeout=self._seconds)
        except RuntimeError as error:  # pebble raises this if a pool broke between two batches
            raise BrokenProcessPool(str(error)) from error


def _result(future: ProcessFuture[Any]) -> Any:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        raise error
    if isinstance(error, FutureTimeoutError | ProcessExpired | MemoryError):
        return OutOfResourcesError(last_error(error))
    return error
