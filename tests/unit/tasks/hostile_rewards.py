"""Reward functions that misbehave in every way we know; each completion's first word names the way."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

KIB = 1024


def reward(prompts: list[str], completions: list[str], metadata: list[dict[str, Any]]) -> Any:
    return WAYS[completions[0].split()[0]](len(completions))


def fine(count: int) -> list[float]:
    return [0.5] * count


def hang(count: int) -> None:
    time.sleep(1000)


def spin(count: int) -> None:
    while True:
        pass


def ignore_signals(count: int) -> None:
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


def stop_itself(count: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def exit_at_once(count: int) -> None:
    os._exit(0)


def exit_politely(count: int) -> None:
    sys.exit(3)


def kill_itself(count: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(count: int) -> None:
    ctypes.string_at(0)


def fork(count: int) -> list[float]:
    """Return in both processes."""
    os.fork()
    return fine(count)


def fork_and_raise(count: int) -> list[float]:
    if os.fork() == 0:
        raise ValueError("the child")
    return fine(count)


def fork_and_leave(count: int) -> list[float]:
    if os.fork() == 0:
        time.sleep(1000)
    return fine(count)


def fork_a_daemon(count: int) -> list[float]:
    """Leave a grandchild in a session of its own, which no signal to the worker's group reaches."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    os.wait()
    return fine(count)


def fork_and_hang(count: int) -> None:
    for _ in range(3):
        if os.fork() == 0:
            time.sleep(1000)
    time.sleep(1000)


def start_a_program(count: int) -> list[float]:
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return fine(count)


def print_much(count: int) -> list[float]:
    for _ in range(32):
        print("x" * 1024 * KIB)
        print("y" * 1024 * KIB, file=sys.stderr)
    return fine(count)


def print_a_gigabyte(count: int) -> list[float]:
    for _ in range(1024):
        os.write(1, b"x" * 1024 * KIB)
    return fine(count)


def print_json(count: int) -> list[float]:
    print('{"verb": "train"}')
    return fine(count)


def close_everything(count: int) -> list[float]:
    os.closerange(0, 1000)
    return fine(count)


def write_everywhere(count: int) -> list[float]:
    """Forge the header of a huge reply."""
    for number in range(3, 1000):
        try:
            os.write(number, b"nonsense" * 4)
        except OSError:
            continue
    return fine(count)


def leave_a_thread(count: int) -> list[float]:
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return fine(count)


def use_all_memory(count: int) -> list[float]:
    return [float(len(bytearray(64 * 1024 * 1024 * KIB)))] * count


def raise_an_error(count: int) -> float:
    return 1 / 0


def raise_an_interrupt(count: int) -> None:
    raise KeyboardInterrupt


def recurse(count: int) -> Any:
    return recurse(count)


def raise_what_cannot_be_shown(count: int) -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            sys.exit(1)

    raise SilentError


def nan(count: int) -> list[float]:
    return [math.nan] * count


def infinite(count: int) -> list[float]:
    return [math.inf] * count


def huge_number(count: int) -> list[int]:
    return [10**400] * count


def one_nan(count: int) -> list[float]:
    return [math.nan, *fine(count - 1)]


def too_short(count: int) -> list[float]:
    return fine(count - 1)


def too_long(count: int) -> list[float]:
    return fine(count + 1)


def endless(count: int) -> Iterator[float]:
    while True:
        yield 1.0


def empty(count: int) -> list[float]:
    return []


def none(count: int) -> None:
    return None


def one_none(count: int) -> list[float | None]:
    return [None, *fine(count - 1)]


def text(count: int) -> str:
    return "1" * count


def texts(count: int) -> list[str]:
    return ["1.0"] * count


def functions(count: int) -> list[Callable[[], None]]:
    return [lambda: None] * count


def locks(count: int) -> list[Any]:
    return [threading.Lock()] * count


def table(count: int) -> dict[str, float]:
    return {"reward": 1.0}


def nested(count: int) -> list[Any]:
    return [{"a": {"b": 1.0}}] * count


def bad_name(count: int) -> list[dict[Any, float]]:
    return [{"<script>": 1.0}] * count


def no_components(count: int) -> list[dict[str, float]]:
    return [{}] * count


def large_components(count: int) -> list[dict[str, float]]:
    return [{"a": 1e308, "b": 1e308}] * count


def many_components(count: int) -> list[dict[str, float]]:
    return [{f"c{number}": 1.0 for number in range(1000)}] * count


def hang_in_float(count: int) -> list[Any]:
    class Slow:
        def __float__(self) -> float:
            time.sleep(1000)
            return 1.0

    return [Slow()] * count


async def hang_in_a_coroutine(count: int) -> list[float]:
    import asyncio  # slow to import: most ways do not need it

    await asyncio.sleep(1000)
    return fine(count)


async def raise_in_a_coroutine(count: int) -> list[float]:
    raise ValueError("later")


WAYS: dict[str, Callable[[int], Any]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__ and name != "reward"
}
