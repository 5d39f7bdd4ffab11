"""A worker process: import a module that serves requests, then answer them until the run closes its connection.

The process starts from a clean interpreter, as the leader of a session of its own. It imports nothing heavy of
betterhalf, and whatever the served code raises or returns becomes a small JSON reply.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from betterhalf.errors import ConfigError
from betterhalf.tasks.worker_channel import MAX_TEXT, missing_bytes, pack, unpack
from betterhalf.tasks.worker_limits import bound_memory

Serve = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Function from a request to its reply; the function `load` of a worker's module returns it."""


def main(file_descriptor: int) -> None:
    """Serve requests on a connected socket; the process and its group end when the other end is closed."""
    connection = socket.socket(fileno=file_descriptor)
    connection.set_inheritable(False)  # a program that the served code starts must not hold it open
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_first_to_die()
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    serve: Serve | None = _answer(connection, lambda: _load(requests.get()))
    while serve is not None:
        _answer(connection, lambda: (serve(requests.get()), None))


def _receive(connection: socket.socket, requests: queue.SimpleQueue[Any]) -> None:
    """Hand on each request; at the end of the connection, kill this process group, however busy it is."""
    received = bytearray()
    with suppress(OSError):
        while True:
            missing = missing_bytes(received)
            if missing == 0:
                requests.put(unpack(received))
                received.clear()
                continue
            chunk = connection.recv(min(missing, 2**20))
            if not chunk:
                break
            received += chunk
    os.killpg(0, signal.SIGKILL)


def _load(start: Mapping[str, Any]) -> tuple[dict[str, Any], Serve]:
    """Import the module, let it prepare itself, and then limit the memory."""
    serve: Serve = importlib.import_module(start["module"]).load(start["arguments"])
    if start["memory_bytes"] is not None:
        bound_memory(start["memory_bytes"])
    return {"ready": True}, serve


def _answer(connection: socket.socket, work: Callable[[], tuple[dict[str, Any], Any]]) -> Any:
    """Send the reply of some work on the served code, and return its other result; a forked child ends here."""
    process = os.getpid()
    try:
        reply, result = work()
    except ConfigError as error:
        reply, result = {"config_error": str(error)}, None
    except BaseException as error:  # the user's code may raise anything, SystemExit included
        cause = described(error)
        reply, result = {"error": "exception", "message": cause + _place(error), "cause": cause}, None
    if os.getpid() != process:
        os._exit(0)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    connection.sendall(pack(reply))
    return result


def described(error: BaseException) -> str:
    """Return the type and the text of an error, on one line."""
    try:
        text = " ".join(str(error)[: 2 * MAX_TEXT].split())
    except BaseException:  # `__str__` is the user's code too
        text = ""
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:MAX_TEXT]


def _place(error: BaseException) -> str:
    """Return the line of the served code that raised the error, in parentheses."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""


def _be_first_to_die() -> None:
    """Ask Linux to end this process first when memory runs out, rather than the one that trains."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
