"""Several reward workers that share the requests of a step."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from betterhalf.errors import ConfigError, RewardError
from betterhalf.tasks.worker_process import WorkerFailureError, WorkerProcess

_STARTS = 2


class WorkerPool:
    """Workers that start when `start` or the first `run` is called, and run until `close`."""

    def __init__(self, start: Mapping[str, Any], *, workers: int, seconds: float) -> None:
        """Create the pool, without starting its workers.

        Args:
            start: first message of each worker.
            workers: number of processes.
            seconds: time limit of a request.
        """
        self._workers = [WorkerProcess(dict(start)) for _ in range(workers)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._seconds = seconds
        for worker in self._workers:
            self._idle.put(worker)

    def start(self) -> None:
        """Start one worker, so that a module that cannot be imported is found before anything is sampled.

        Raises:
            ConfigError: a function does not exist, cannot be imported, or takes other arguments.
        """
        _started(self._workers[0])

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the reply to each request; one without a reply gives `error` and `message`.

        Raises:
            RewardError: a worker cannot be started again.
        """
        threads = ThreadPoolExecutor(max_workers=len(self._workers))
        try:
            return list(threads.map(self._ask, requests))
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
        for worker in self._workers:
            worker.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            _restarted(worker)
            return worker.ask(dict(request), self._seconds)
        except WorkerFailureError as error:
            return {"error": error.kind, "message": str(error)}
        finally:
            self._idle.put(worker)


def _restarted(worker: WorkerProcess) -> None:
    """Start a worker unless it runs.

    Raises:
        RewardError: that fails twice.
    """
    for trial in range(_STARTS):
        try:
            _started(worker)
            return
        except ConfigError as error:
            if trial == _STARTS - 1:
                raise RewardError(f"a reward worker cannot start: {error}") from error


def _started(worker: WorkerProcess) -> None:
    try:
        reply = worker.start()
    except WorkerFailureError as error:
        text = worker.take_printed()[0].strip()
        printed = f" It printed: {text[-500:]}" if text else ""
        raise ConfigError(
            f"importing the module of the reward fails: {error}.{printed} A module must only define functions when it "
            "is imported."
        ) from error
    if "ready" not in reply:
        raise ConfigError(reply.get("config_error") or f"importing the reward raises {reply.get('message')}")
