"""Several worker processes that share the requests of a step."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from betterhalf.errors import RewardError
from betterhalf.tasks.worker_janitor import Janitor
from betterhalf.tasks.worker_process import WorkerFailureError, WorkerProcess

StartFault = Literal["config", "exception", "process"]
"""Kind of failure at the start: the module refuses its arguments, it raises an error, or its process ends or hangs."""
_STARTS = 2
_SHOWN = 500


class WorkerStartError(RewardError):
    """A worker process cannot start."""

    def __init__(self, kind: StartFault, message: str, *, cause: str = "") -> None:
        """Create the error.

        Args:
            kind: what happened.
            message: what the worker said, as a clause.
            cause: type and text of the error that was raised, without its place.
        """
        super().__init__(f"a worker process cannot start: {message}")
        self.kind: StartFault = kind
        self.message = message
        self.cause = cause or message


class WorkerPool:
    """Workers that start when `start` or the first `run` is called, and run until `close`; later calls start others."""

    def __init__(
        self,
        module: str,
        arguments: Mapping[str, Any],
        *,
        workers: int,
        seconds: float,
        memory_bytes: int | None,
    ) -> None:
        """Create the pool, without starting its workers.

        Args:
            module: name of the module in betterhalf.tasks whose `load` makes the function that answers requests.
            arguments: argument of `load`.
            workers: number of processes.
            seconds: time limit of a request.
            memory_bytes: address space of a worker beyond its imports; None for no limit.
        """
        start = {"module": f"betterhalf.tasks.{module}", "arguments": arguments, "memory_bytes": memory_bytes}
        self._start = start
        self._count = workers
        self._seconds = seconds
        self._workers: list[WorkerProcess] = []
        self._janitor: Janitor | None = None
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()

    def start(self) -> None:
        """Start one worker, so that code that cannot be used is found before anything is sampled.

        Raises:
            WorkerStartError: it cannot start.
        """
        self._open()
        try:
            _started(self._workers[0])
        except BaseException:
            self.close()
            raise

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the reply to each request, in order; a request without a reply gives `error` and `message`.

        Raises:
            WorkerStartError: a worker cannot start, twice.
        """
        if not requests:
            return []
        self._open()
        idle = self._idle  # after `close`, threads that still run find only workers that cannot start
        threads = ThreadPoolExecutor(max_workers=self._count)
        try:
            return list(threads.map(lambda request: self._ask(idle, request), requests))
        except BaseException:  # an interrupt must not wait for the time limits
            self.close()
            raise
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def take_printed(self) -> tuple[str, int]:
        """Return the first characters that any worker printed since the last call, and the number of bytes of all."""
        taken = [worker.take_printed() for worker in self._workers]
        return next((text for text, _ in taken if text), ""), sum(size for _, size in taken)

    def close(self) -> None:
        """End the workers and all that they have started; calling it twice is harmless."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()
        janitor, self._janitor = self._janitor, None
        if janitor is not None:
            janitor.close()

    def _open(self) -> None:
        """Create the workers, without starting their processes, unless they exist."""
        if not self._workers:
            mark = uuid.uuid4().hex
            self._janitor = Janitor(mark)
            self._workers = [WorkerProcess(self._start, mark) for _ in range(self._count)]
            self._idle = queue.SimpleQueue()
            for worker in self._workers:
                self._idle.put(worker)

    def _ask(self, idle: queue.SimpleQueue[WorkerProcess], request: Mapping[str, Any]) -> dict[str, Any]:
        worker = idle.get()
        try:
            _restarted(worker)
            return worker.ask(dict(request), self._seconds)
        except WorkerFailureError as error:
            return {"error": error.kind, "message": str(error)}
        finally:
            idle.put(worker)


def _restarted(worker: WorkerProcess) -> None:
    """Start a worker unless it runs.

    Raises:
        WorkerStartError: that fails twice.
    """
    for trial in range(_STARTS):
        try:
            _started(worker)
            return
        except WorkerStartError:
            if trial == _STARTS - 1:
                raise


def _started(worker: WorkerProcess) -> None:
    try:
        reply = worker.start()
    except WorkerFailureError as error:
        text = worker.take_printed()[0].strip()
        printed = f". It printed: {text[-_SHOWN:]}" if text else ""
        raise WorkerStartError("process", f"{error}{printed}") from error
    if "ready" in reply:
        return
    if "config_error" in reply:
        raise WorkerStartError("config", reply["config_error"])
    raise WorkerStartError("exception", str(reply.get("message")), cause=str(reply.get("cause", "")))
