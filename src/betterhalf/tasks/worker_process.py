"""One worker process, seen from the run: start it, ask it, and end it with everything that its code has started."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betterhalf.tasks.worker_channel import MARK, MAX_MESSAGE_BYTES, PRINTED_BYTES, missing_bytes, pack, unpack
from betterhalf.types import RewardFailure

START_SECONDS = 120.0
"""Time limit for importing the modules of a worker, the user's among them."""
_POLL_SECONDS = 0.05
_SCANS = 20
_SCRIPT = "import sys; sys.path[:] = {path!r}; from betterhalf.tasks.worker_main import main; main({connection})"


class WorkerFailureError(Exception):
    """A worker did not reply; it is ended, and the next request starts another."""

    def __init__(self, kind: RewardFailure, message: str) -> None:
        super().__init__(message)
        self.kind: RewardFailure = kind


@dataclass(slots=True, kw_only=True)
class _Running:
    """A process and its connections."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    """Requests and replies."""
    output: int
    """Read end of the pipe to which standard output and standard error go."""
    mark: str
    """Value of MARK in its environment and its descendants'."""


class WorkerProcess:
    """A worker that starts on request and is replaced after each failure.

    Its process leads a session of its own, so that one signal reaches all that its code has forked. What the code
    prints goes to a pipe, which is always drained: the first bytes are kept, the rest is counted.
    """

    def __init__(self, start: dict[str, Any], mark: str) -> None:
        """Create the worker without starting its process.

        Args:
            start: its first message.
            mark: beginning of the marks of its processes.
        """
        self._start = start
        self._mark = mark
        self._running: _Running | None = None
        self._closed = threading.Event()
        self.printed = bytearray()
        """First bytes of what the workers printed since the last `take_printed`."""
        self.printed_bytes = 0
        """Number of bytes that the workers printed since the last `take_printed`."""

    def start(self) -> dict[str, Any]:
        """Start the process unless it runs, and return its first reply.

        Raises:
            WorkerFailureError: the modules take too long to import, or end the process; or `close` was called.
        """
        if self._closed.is_set():
            raise WorkerFailureError("crash", "the run is closing its workers")
        if self._running is not None and self._running.process.poll() is None:
            return {"ready": True}
        self._end()  # one that was killed from outside while it was idle
        self._running = _launch(f"{self._mark}-{uuid.uuid4().hex}")
        if self._closed.is_set():  # by another thread, meanwhile
            self._end()
            raise WorkerFailureError("crash", "the run is closing its workers")
        reply = self._exchange(self._start, START_SECONDS)
        if "ready" not in reply:
            self._end()
        return reply

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the reply to one request.

        Raises:
            WorkerFailureError: it takes longer than `seconds`, the process ends, or its reply is not a message.
        """
        return self._exchange(request, seconds)

    def take_printed(self) -> tuple[str, int]:
        """Return the first characters of what was printed since the last call, and the number of bytes."""
        found = self.printed.decode(errors="replace"), self.printed_bytes
        self.printed, self.printed_bytes = bytearray(), 0
        return found

    def close(self) -> None:
        """End the process and all that it has started; a second call does nothing."""
        self._closed.set()
        self._end()

    def _exchange(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._running is not None
        try:
            received = self._converse(self._running, memoryview(pack(request)), time.monotonic() + seconds, seconds)
            reply = unpack(received)
            if not isinstance(reply, dict):
                raise ValueError(reply)
        except WorkerFailureError:
            self._end()
            raise
        except (OSError, ValueError, RecursionError) as error:
            self._end()
            raise WorkerFailureError("crash", f"its code broke the connection to the run ({error})") from error
        return reply

    def _converse(self, running: _Running, outgoing: memoryview, deadline: float, seconds: float) -> bytearray:
        """Send a request, and return the bytes of the reply; drain what the process prints meanwhile."""
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(running.connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
            selector.register(running.output, selectors.EVENT_READ)
            while missing_bytes(received):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise WorkerFailureError("timeout", f"it took more than {seconds:g} s")
                ready = {key.fd: events for key, events in selector.select(min(left, _POLL_SECONDS))}
                if running.output in ready and not self._drain(running.output):
                    selector.unregister(running.output)
                events = ready.get(running.connection.fileno(), 0)
                if events & selectors.EVENT_WRITE:
                    outgoing = _send(running.connection, outgoing)
                    if not outgoing:
                        selector.modify(running.connection, selectors.EVENT_READ)
                if events & selectors.EVENT_READ:
                    received += _receive(running, received)
                elif not events and running.process.poll() is not None:
                    raise _ended(running.process)
        return received

    def _drain(self, output: int) -> bool:
        """Read some of what the process printed; return False at the end of the pipe."""
        data = os.read(output, 2**16)
        self.printed += data[: PRINTED_BYTES - len(self.printed)]
        self.printed_bytes += len(data)
        return bool(data)

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        _kill(running.process.pid)
        running.process.wait()
        kill_marked(running.mark)
        running.connection.close()
        with suppress(OSError):
            os.set_blocking(running.output, False)
            while self._drain(running.output):
                pass
        os.close(running.output)


def module_path() -> list[str]:
    """Return this process's module path, for another one."""
    return [entry or os.getcwd() for entry in sys.path]


def _launch(mark: str) -> _Running:
    """Start a process with the module path of this one."""
    ours, theirs = socket.socketpair()
    output, printed = os.pipe()
    script = _SCRIPT.format(path=module_path(), connection=theirs.fileno())
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env={**os.environ, MARK: mark},
        )
    finally:
        theirs.close()
        os.close(printed)
    ours.setblocking(False)
    return _Running(process=process, connection=ours, output=output, mark=mark)


def _send(connection: socket.socket, outgoing: memoryview) -> memoryview:
    """Send what the connection takes now, and return the rest; a process that has ended takes nothing."""
    with suppress(BrokenPipeError, ConnectionResetError):
        return outgoing[connection.send(outgoing) :]
    return outgoing[len(outgoing) :]


def _receive(running: _Running, received: bytearray) -> bytes:
    missing = missing_bytes(received)
    if missing > MAX_MESSAGE_BYTES:
        raise WorkerFailureError("too_large", f"its results take more than {MAX_MESSAGE_BYTES >> 20} MiB")
    chunk = b""
    with suppress(ConnectionResetError):
        chunk = running.connection.recv(min(missing, 2**20))
    if not chunk:
        raise _ended(running.process)
    return chunk


def _ended(process: subprocess.Popen[bytes]) -> WorkerFailureError:
    """Return the failure of a process that closed its connection, with its exit status."""
    try:
        status = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return WorkerFailureError("crash", "its code closed the connection to the run")
    if status < 0:
        with suppress(ValueError):
            return WorkerFailureError("crash", f"its code ended the worker by {signal.Signals(-status).name}")
    return WorkerFailureError("crash", f"its code ended the worker with exit status {status}")


def _kill(pid: int) -> None:
    """Kill the session of a worker: its process, and those that its code forked."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill_marked(mark: str) -> None:
    """Kill the processes whose mark begins with `mark`, in any session, until a scan finds none; on Linux only."""
    for _ in range(_SCANS):
        found = marked_processes(mark)
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def marked_processes(mark: str = "") -> list[int]:
    """Return the ids of processes whose mark begins with `mark`; by default, those with any mark, of every run."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
