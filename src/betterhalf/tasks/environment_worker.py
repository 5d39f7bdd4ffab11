"""Worker process of an environment: create the user's object once, then answer calls of its methods."""

from __future__ import annotations

import math
import os
import reprlib
import signal
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from betterhalf.process import end_with_parent
from betterhalf.tasks.turns import Failure
from betterhalf.user_code import load_object

MAX_CHARACTERS = 1_000_000
"""Characters of an observation that leave the worker; `task.max_observation_tokens` cuts further."""
_MAX_MESSAGE = 400

_held: list[Any] = []
"""The environment of this process, or the `Failure` of creating it."""


def start_worker(path: str, settings: Mapping[str, Any]) -> None:
    """Create the environment, whose output goes to standard error: a run's result is on standard output.

    The process leads a group of its own, which ends with the run even if the run is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        os.dup2(2, 1)
        os.setsid()
    if os.getpgrp() == os.getpid():
        end_with_parent(os.getppid())
    try:
        environment = load_object(path, "task.environment")(**settings)
    except BaseException as error:  # the user's code may raise anything, SystemExit included
        environment = Failure(message=_described(error))
    _held[:] = [environment]


def ready() -> Failure | None:
    """Return None once this worker's environment exists, or the reason why it does not."""
    (environment,) = _held
    return environment if isinstance(environment, Failure) else None


def respond(prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> str | Failure | None:
    """Return the observation after the last turn; None if the episode is over."""
    found = _called("respond", prompt, turns, metadata)
    if found is None or isinstance(found, Failure):
        return found
    if not isinstance(found, str):
        return Failure(message=f"respond returned {type(found).__name__}, not a text or None")
    text = found[:MAX_CHARACTERS]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Failure(message="respond returned a text with half of a surrogate pair, which has no encoding")
    return text


def reward(prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> float | Failure:
    """Return the reward of a whole episode."""
    found = _called("reward", prompt, turns, metadata)
    if isinstance(found, Failure):
        return found
    try:
        value = math.nan if isinstance(found, str | bytes) else float(found)
    except Exception:  # `__float__` is the user's code too
        value = math.nan
    if not math.isfinite(value):
        return Failure(message=f"reward returned {reprlib.repr(found)}, not a finite number")
    return value


def _called(method: str, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> Any:
    (environment,) = _held
    if isinstance(environment, Failure):
        return environment
    try:
        return getattr(environment, method)(prompt, list(turns), dict(metadata))
    except BaseException as error:  # the user's code may raise anything, SystemExit included
        return Failure(message=_described(error))


def _described(error: BaseException) -> str:
    """Return the error, and the line of the user's code that raised it."""
    try:
        text = " ".join(str(error).split())[:_MAX_MESSAGE]
    except BaseException:  # `__str__` is the user's code too
        text = ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"
