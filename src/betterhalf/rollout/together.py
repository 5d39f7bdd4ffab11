"""Several sequences of calls to other processes, run at the same time from one thread.

A sequence is a generator that yields futures and is sent their results, so that it reads like blocking code and needs
no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

_T = TypeVar("_T")

Steps = Generator["Future[Any]", Any, _T]
"""Generator that yields a future, is sent its result or thrown its exception, and returns the result of the whole."""


def reply(future: Future[_T]) -> Steps[_T]:
    """Wait for one future."""
    result: _T = yield future
    return result


def run_together(work: Mapping[int, Steps[_T]]) -> dict[int, _T]:
    """Run all generators to their ends, each as fast as its own futures allow, and return their results.

    The first exception that leaves a generator is raised at once. The other generators are abandoned, without waiting
    for their futures.

    Args:
        work: generators by key; of futures that finish at the same time, the lowest key continues first.

    Returns:
        Key -> result, in the order of `work`.
    """
    waiting: dict[int, Future[Any]] = {}
    results: dict[int, _T] = {}

    def advance(key: int, resume: Callable[[], Future[Any]]) -> None:
        try:
            waiting[key] = resume()
        except StopIteration as end:
            results[key] = end.value

    for key, steps in work.items():
        advance(key, lambda steps=steps: next(steps))  # type: ignore[misc]
    while waiting:
        finished, _ = wait(waiting.values(), return_when=FIRST_COMPLETED)
        for key in sorted(key for key, future in waiting.items() if future in finished):
            future = waiting.pop(key)
            advance(key, lambda steps=work[key], future=future: _resume(steps, future))  # type: ignore[misc]
    return {key: results[key] for key in work}


def _resume(steps: Steps[_T], future: Future[Any]) -> Future[Any]:
    error = future.exception()
    return steps.send(future.result()) if error is None else steps.throw(error)
