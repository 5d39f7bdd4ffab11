"""A child process that answers requests over a socket pair, one at a time.

It never outlives its parent: it ends when the socket closes, and one of its threads watches the parent process. Its
output goes to a log file, whose last lines are shown when it crashes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from betterhalf.errors import BetterhalfError, EngineDiedError, EngineError, InputError, MissingExtraError

_ERRORS: dict[str, type[BetterhalfError]] = {
    "refused": InputError,
    "not_installed": MissingExtraError,
    "failed": EngineError,
}
"""Status of a reply that is not `ok` -> error to raise."""

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0
_LOG_LINES = 12
_LOG_BYTES = 20_000


class ServerProcess:
    """Process `python -m MODULE FD PARENT_PID` that answers requests; an interrupted request ends it."""

    def __init__(self, module: str, environment: Mapping[str, str], log: Path) -> None:
        """Start the process; it is ready when it answers its first request.

        Args:
            module: module that runs `server.serve` on the file descriptor given as its first argument.
            environment: variables added to those of this process.
            log: file that its standard output and standard error are appended to.
        """
        self._log = log
        ours, theirs = socket.socketpair()
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Its own process group: Ctrl-C reaches only this process, and its own children end with it.
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Process id, also the id of its process group."""
        return self._process.pid

    def ask(self, verb: str, *, seconds: float | None = None, **values: Any) -> Any:
        """Send one request and wait for the answer.

        Args:
            verb: name of the handler.
            seconds: time limit; None for no limit.
            values: arguments of the handler; they must be picklable.

        Raises:
            EngineDiedError: the process ended.
            EngineError: the request failed, or was not answered in time.
            InputError: the request was refused.
            MissingExtraError: a package is missing.
        """
        try:
            self._connection.send((verb, values))
            self._wait(verb, seconds)
            status, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineDiedError(self._end_message(verb)) from error
        except BaseException:
            # An answer left unread would be taken for the answer to the next request.
            self.close(grace=0.0)
            raise
        if status != "ok":
            raise _ERRORS[status](value)
        return value

    def _wait(self, verb: str, seconds: float | None) -> None:
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self._connection.poll(_POLL_SECONDS):
            if self._process.poll() is not None and not self._connection.poll(0):
                raise EOFError
            if deadline is not None and time.monotonic() > deadline:
                raise EngineError(
                    f"vLLM did not answer {verb!r} within {seconds:g} seconds; allow more with engine.start_seconds. "
                    f"Its log ends with:\n{self.log_tail()}"
                )

    def _end_message(self, verb: str) -> str:
        """Reap the process, end its group, and return a message about how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self.close(grace=0.0)
        code = self._process.returncode
        fix = (
            " If memory ran out, lower engine.max_concurrent or engine.kv_cache_gib." if code == -signal.SIGKILL else ""
        )
        return (
            f"the vLLM process {self.pid} ended ({_exit_text(code)}) before it answered {verb!r}.{fix} "
            f"Its log ends with:\n{self.log_tail()}"
        )

    def log_tail(self) -> str:
        """Return the last lines of its output, indented."""
        if not self._log.exists():
            return "  (no log)"
        raw = self._log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
        lines = [line for line in raw.splitlines() if line.strip()][-_LOG_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (empty)"

    def kill(self) -> None:
        """Kill the process and its children at once; a request in progress in another thread then fails."""
        self._signal(signal.SIGKILL)

    def close(self, grace: float = _GRACE_SECONDS) -> None:
        """Close the socket, which tells the process to end; wait; then end its group. Harmless when repeated."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE_SECONDS)
        # Processes that it started are in its group and may outlive it.
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "it does not respond"
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit status {code}"
