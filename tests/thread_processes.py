"""Processes of a cluster as threads of this one, and its object store as a dictionary; no Ray."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest


class ThreadProcess:
    """An object whose calls run one at a time in a thread; implements `cluster.process.Process`."""

    def __init__(self, made: Any, name: str, died: Callable[[str], Exception]) -> None:
        self.object, self.name, self.ended = made, name, False
        self.calls: list[str] = []
        self._died = died
        self._thread, self._aside = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: list[Future[Any]] = []

    def call(
        self, method: str, *arguments: Any, seconds: float | None = None, aside: bool = False, **keywords: Any
    ) -> Future[Any]:
        self.calls.append(method)
        answer: Future[Any] = Future()
        if self.ended:
            answer.set_exception(self._died(f"{self.name} ended"))
            return answer
        self._pending.append(answer)

        def run() -> None:
            try:
                value = getattr(self.object, method)(*arguments, **keywords)
            except Exception as error:
                with suppress(InvalidStateError):
                    answer.set_exception(error)
            else:
                with suppress(InvalidStateError):
                    answer.set_result(value)

        (self._aside if aside else self._thread).submit(run)
        return answer

    def end(self) -> None:
        """Answer nothing any more; what runs in the thread goes on, as if it were in another process."""
        self.ended = True
        for answer in self._pending:
            with suppress(InvalidStateError):
                answer.set_exception(self._died(f"{self.name} ended"))
        self._thread.shutdown(wait=False)
        self._aside.shutdown(wait=False)


class ThreadSession:
    """Stand-in for `cluster.session.Session` that starts threads."""

    def __init__(self) -> None:
        self.processes: list[ThreadProcess] = []

    def start(
        self, build: Callable[..., object], slot: Any, name: str, died: Callable[[str], Exception], **arguments: Any
    ) -> ThreadProcess:
        self.processes.append(ThreadProcess(build(**arguments), name, died))
        return self.processes[-1]

    def close(self) -> None:
        for process in self.processes:
            process.end()


class RayError(Exception):
    """Error of the stand-in for Ray."""


def stand_in_store(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Put a stand-in for Ray in its place, and return the dictionary that holds its objects."""
    objects: dict[int, Any] = {}

    def put(value: Any) -> int:
        for *_, raw in value:
            raw.flags.writeable = False  # as Ray's are
        objects[len(objects)] = value
        return len(objects) - 1

    def get(reference: int) -> Any:
        if reference not in objects:
            raise RayError("lost")
        return objects[reference]

    ray, exceptions = types.ModuleType("ray"), types.ModuleType("ray.exceptions")
    ray.put, ray.get, exceptions.RayError = put, get, RayError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    return objects
