"""Controller's handle of a process that Ray started: calls with time limits, ending it, and the tail of its log."""

from __future__ import annotations

import os
import queue
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from betterhalf.cluster.host import About, Outcome

ASIDE = "aside"
"""Name of the concurrency group for calls that run in a thread of their own, in parallel with the others."""

_LOG_LINES = 12
_LOG_BYTES = 20_000
_END_SECONDS = 10.0


class Process(Protocol):
    """One process that answers calls, one at a time, in order."""

    @property
    def name(self) -> str:
        """Role and index, and, once they are known, host and process id; for messages."""
        ...

    @property
    def host(self) -> str | None:
        """Name of its host; None until the process has reported it."""
        ...

    @property
    def ended(self) -> bool:
        """True once the process is known to have ended."""
        ...

    def call(
        self, method: str, *arguments: Any, seconds: float | None = None, aside: bool = False, **keywords: Any
    ) -> Future[Any]:
        """Call a method of the object in the process; references to stored objects arrive as the objects.

        Args:
            method: name of the method.
            arguments: positional arguments.
            seconds: time limit, which includes waiting for earlier calls; None for no limit.
            aside: run the method in a thread of its own, in parallel with the other calls.
            keywords: keyword arguments.

        Returns:
            A future that raises the method's own error, or the error of `died` (see `Session.start`) if the process
            has ended or the time limit has passed. The process is ended after the time limit.
        """
        ...

    def end(self) -> None:
        """End the process and its children at once; does nothing if it has ended."""
        ...


class RayProcess:
    """Process that runs a `cluster.host.Host`; implements `Process`.

    Ray delivers results in a thread of its own, where callbacks must neither block nor call Ray; a thread of this
    object handles them.
    """

    def __init__(self, remote: Any, role: str, died: Callable[[str], Exception], node: str) -> None:
        """Supervise a started process.

        Args:
            remote: Ray's handle.
            role: role and index, such as `rank 0`.
            died: builds, from a message, the error of a call that the process can no longer answer.
            node: Ray's identifier of the controller's host.
        """
        self._remote, self._died, self._node = remote, died, node
        self.role = role
        """Role and index, such as `rank 0`."""
        self._lock = threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._end: Exception | None = None
        self._about: About | None = None
        self._pidfd: int | None = None
        self._arrived: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, name=f"answers of {role}", daemon=True).start()
        self._when_done(remote.about.remote(), self._introduce)

    def _when_done(self, reference: Any, act: Callable[[Future[Any]], None]) -> None:
        reference.future().add_done_callback(lambda done: self._arrived.put(lambda: act(done)))

    def _deliver(self) -> None:
        while (act := self._arrived.get()) is not None:
            act()

    @property
    def name(self) -> str:
        """See `Process.name`."""
        about = self._about
        return self.role if about is None else f"{self.role} (host {about.host}, process {about.pid})"

    @property
    def host(self) -> str | None:
        """See `Process.host`."""
        return None if self._about is None else self._about.host

    @property
    def ended(self) -> bool:
        """See `Process.ended`."""
        return self._end is not None

    def call(
        self, method: str, *arguments: Any, seconds: float | None = None, aside: bool = False, **keywords: Any
    ) -> Future[Any]:
        """See `Process.call`."""
        send = self._remote.call.options(concurrency_group=ASIDE) if aside else self._remote.call
        answer: Future[Any] = Future()
        with self._lock:
            if self._end is not None:
                answer.set_exception(self._end)
                return answer
            self._pending.add(answer)
            reference = send.remote(method, *arguments, **keywords)
        if seconds is not None:
            limit = threading.Timer(seconds, self._too_late, (method, seconds))
            limit.daemon = True
            limit.start()
            answer.add_done_callback(lambda _: limit.cancel())
        self._when_done(reference, lambda done: self._settle(answer, done))
        return answer

    def end(self) -> None:
        """See `Process.end`; for a process on this host, wait up to 10 s until it has ended and its memory is free."""
        self.lose(self._died(f"{self.name} was ended"))

    def lose(self, error: Exception) -> None:
        """End the process, and fail every unanswered and every later call with `error`."""
        import ray

        with self._lock:
            first = self._end is None
            self._end = self._end or error
            pending, self._pending = self._pending, set()
        if first:
            with suppress(Exception):  # the cluster may have ended before
                ray.kill(self._remote, no_restart=True)
            self._kill_here()
            self._arrived.put(None)
        for answer in pending:
            _fail(answer, error)

    def _introduce(self, done: Future[About]) -> None:
        if done.exception() is not None:
            return
        about = done.result()
        with self._lock:
            self._about = about
            if about.node == self._node and self._end is None and hasattr(os, "pidfd_open"):
                with suppress(OSError):
                    # A pidfd keeps referring to this process, even if its pid is used again.
                    self._pidfd = os.pidfd_open(about.pid)

    def _settle(self, answer: Future[Any], done: Future[Outcome]) -> None:
        with self._lock:
            self._pending.discard(answer)
        error = done.exception()
        if error is not None:
            failure = self._end or self._died(self._end_message(error))
            self.lose(failure)
            _fail(answer, failure)
            return
        outcome = done.result()
        with suppress(InvalidStateError):
            if outcome.error is None:
                answer.set_result(outcome.value)
            else:
                answer.set_exception(outcome.error)

    def _too_late(self, method: str, seconds: float) -> None:
        words = f"{self.name} did not answer {method!r} within {seconds:g} seconds and was ended."
        self.lose(self._died(f"{words} {self._log_words()}"))

    def _end_message(self, error: BaseException) -> str:
        from ray.exceptions import OutOfMemoryError

        short = isinstance(error, OutOfMemoryError)
        why = " because its host is short of memory: free some, or start fewer processes there" if short else ""
        return f"{self.name} ended{why}. {self._log_words()}"

    def _log_words(self) -> str:
        about = self._about
        if about is None or not about.log:
            return "It ended before it reported the path of its log."
        if about.node != self._node:
            return f"Its log is {about.log} on {about.host}."
        return f"Its log ends with:\n{log_tail(Path(about.log))}"

    def _kill_here(self) -> None:
        """Kill the process if it runs on this host: a process that is stopped (SIGSTOP) does not read Ray's request."""
        with self._lock:
            pidfd, self._pidfd = self._pidfd, None
        if pidfd is None:
            return
        with suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], _END_SECONDS)
        os.close(pidfd)


def _fail(answer: Future[Any], error: Exception) -> None:
    with suppress(InvalidStateError):
        answer.set_exception(error)


def log_tail(log: Path) -> str:
    """Return the last lines of a log, indented."""
    try:
        raw = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
    except OSError:
        return "  (no log)"
    marks = (":job_id:", ":actor_name:", ":task_name:")
    lines = [line for line in raw.splitlines() if line.strip() and not line.startswith(marks)][-_LOG_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (empty)"
