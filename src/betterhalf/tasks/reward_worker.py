"""A worker process: import the user's reward functions, then grade completions until the run closes its connection.

The process starts from a clean interpreter, as the leader of a session of its own. It imports nothing heavy, and runs
the user's code alone: whatever that code raises or returns becomes a small JSON reply.
"""

from __future__ import annotations

import inspect
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from betterhalf.errors import ConfigError
from betterhalf.tasks.reward_values import read_rewards
from betterhalf.tasks.worker_channel import MAX_TEXT, missing_bytes, pack, unpack
from betterhalf.tasks.worker_limits import bound_memory
from betterhalf.user_code import load_object, require_call

EXPECTED = "def {name}(prompts, completions, metadata): return [1.0, ...]"
"""Signature of a reward over a batch."""
EXPECTED_ONE = "def {name}(prompt, completion, metadata): return 1.0"
"""Signature of a reward for one completion."""

Functions = Mapping[str, tuple[Callable[..., Any], bool]]
"""Name of each reward -> its function, and True if it takes a batch."""


def main(file_descriptor: int) -> None:
    """Serve requests on a connected socket; the process ends when the other end is closed."""
    connection = socket.socket(fileno=file_descriptor)
    connection.set_inheritable(False)  # a program that the user's code starts must not hold it open
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_first_to_die()
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    functions = _answer(connection, lambda: _load(requests.get()))
    while functions is not None:
        _answer(connection, lambda: _grade(functions, requests.get()))


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


def _answer(connection: socket.socket, work: Callable[[], tuple[dict[str, Any], Any]]) -> Any:
    """Send the reply of some work on the user's code, and return its other result; a forked child ends here."""
    process = os.getpid()
    try:
        reply, result = work()
    except ConfigError as error:
        reply, result = {"config_error": str(error)}, None
    except BaseException as error:  # the user's code may raise anything, SystemExit included
        reply, result = {"error": "exception", "message": _described(error)}, None
    if os.getpid() != process:
        os._exit(0)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    connection.sendall(pack(reply))
    return result


def _load(start: Mapping[str, Any]) -> tuple[dict[str, Any], Functions]:
    """Import the reward functions, and check that they can be called."""
    functions: dict[str, tuple[Callable[..., Any], bool]] = {}
    for name, each in start["functions"].items():
        key = f"{each['key']}={each['path']}"
        function = load_object(each["path"], each["key"])
        example = (EXPECTED if each["batched"] else EXPECTED_ONE).format(name=each["path"].rpartition(":")[2])
        require_call(function, example, ("prompts", "completions", "metadata"), key)
        functions[name] = (function, each["batched"])
    if start["memory_bytes"] is not None:
        bound_memory(start["memory_bytes"])
    return {"ready": True}, functions


def _grade(functions: Functions, request: Mapping[str, Any]) -> tuple[dict[str, Any], None]:
    """Return the rewards of the siblings of one prompt."""
    function, batched = functions[request["reward"]]
    completions: list[str] = request["completions"]
    metadata = [dict(each) for each in request["metadata"]]
    prompts = [request["prompt"]] * len(completions)
    if batched:
        return read_rewards(_finished(function(prompts, completions, metadata)), len(completions)), None
    calls = [function(*arguments) for arguments in zip(prompts, completions, metadata, strict=True)]
    return read_rewards(_all_finished(calls), len(completions)), None


def _finished(result: Any) -> Any:
    """Return the result of a function, or of its coroutine."""
    return _all_finished([result])[0]


def _all_finished(results: Sequence[Any]) -> list[Any]:
    """Await all coroutines among the results, at the same time."""
    if not any(inspect.isawaitable(result) for result in results):
        return list(results)
    import asyncio  # it takes longer to import than a typical reward takes to run

    async def awaited(result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    async def together() -> list[Any]:
        return list(await asyncio.gather(*map(awaited, results)))

    return asyncio.run(together())


def _described(error: BaseException) -> str:
    """Return the error, and the line of the user's code that raised it."""
    try:
        text = " ".join(str(error)[: 2 * MAX_TEXT].split())
    except BaseException:  # `__str__` is the user's code too
        text = ""
    name = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return name[:MAX_TEXT] + where


def _be_first_to_die() -> None:
    """Ask Linux to end this process first when memory runs out, rather than the one that trains."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
