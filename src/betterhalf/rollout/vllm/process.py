"""A child process that answers questions, one at a time, over a socket pair.

It never outlives us: it ends when its end of the socket closes, and a thread in it looks whether we still live. Its
output goes to a log file, whose last lines explain a death.
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
"""How a reply that is not `ok` is raised here."""

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0
_LOG_LINES = 12
_LOG_BYTES = 20_000


class ServerProcess:
    """Starts `python -m MODULE FD PARENT_PID` and asks it; after an error in between, it is ended."""

    def __init__(self, module: str, environment: Mapping[str, str], log: Path) -> None:
        """Start the process; it is ready when it answers its first question.

        Args:
            module: runs `server.serve` on the file descriptor that is its first argument.
            environment: added to ours.
            log: takes its standard output and standard error.
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
                    # A group of its own: Ctrl-C reaches us alone, and what it started ends with it.
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
        """Send one question and wait for its answer.

        Args:
            verb: what to do.
            seconds: time limit; none if absent.
            values: anything that can be pickled.

        Raises:
            EngineDiedError: the process ended.
            EngineError: it failed, or did not answer in time.
            InputError: it refused.
            MissingExtraError: it lacks a package.
        """
        try:
            self._connection.send((verb, values))
            self._wait(verb, seconds)
            status, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineDiedError(self._obituary(verb)) from error
        except BaseException:
            # An answer that nobody took would be read as that to the next question.
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

    def _obituary(self, verb: str) -> str:
        """How it ended, in one message; the process is reaped and its group ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self.close(grace=0.0)
        code = self._process.returncode
        cure = (
            " If memory ran out, lower engine.max_concurrent or engine.kv_cache_gib." if code == -signal.SIGKILL else ""
        )
        return (
            f"the vLLM process {self.pid} ended ({_how(code)}) before it answered {verb!r}.{cure} Its log ends with:\n"
            f"{self.log_tail()}"
        )

    def log_tail(self) -> str:
        """The last lines of its output, indented."""
        if not self._log.exists():
            return "  (no log)"
        raw = self._log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
        lines = [line for line in raw.splitlines() if line.strip()][-_LOG_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (empty)"

    def close(self, grace: float = _GRACE_SECONDS) -> None:
        """Close the socket, which it takes as the end; wait; then end its whole group. Harmless when repeated."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE_SECONDS)
        # Helpers that it started are in its group and may outlive it.
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _how(code: int | None) -> str:
    if code is None:
        return "it does not react"
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit status {code}"
