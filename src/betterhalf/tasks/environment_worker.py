"""Serve a user-defined environment in a worker process: create it once, then answer calls of its methods."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from betterhalf.tasks.worker_main import Serve
from betterhalf.user_code import load_object

MAX_CHARACTERS = 1_000_000
"""Maximum number of characters of an observation that the worker sends; `task.max_observation_tokens` cuts further."""


def load(arguments: Mapping[str, Any]) -> Serve:
    """Create the environment, and return the function that calls its methods."""
    return partial(_answer, load_object(arguments["path"], "task.environment")(**arguments["settings"]))


def _answer(environment: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a method's call, or the reason why it is unusable."""
    found = getattr(environment, request["method"])(request["prompt"], request["turns"], request["metadata"])
    return _observation(found) if request["method"] == "respond" else _reward(found)


def _observation(found: Any) -> dict[str, Any]:
    if found is None:
        return {"result": None}
    if not isinstance(found, str):
        return _unusable(f"respond returned {type(found).__name__}, not a text or None")
    text = found[:MAX_CHARACTERS]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _unusable("respond returned a text with half of a surrogate pair, which has no encoding")
    return {"result": text}


def _reward(found: Any) -> dict[str, Any]:
    try:
        value = math.nan if isinstance(found, str | bytes) else float(found)
    except Exception:  # `__float__` is the user's code too
        value = math.nan
    if not math.isfinite(value):
        return _unusable(f"reward returned {reprlib.repr(found)}, not a finite number")
    return {"result": value}


def _unusable(message: str) -> dict[str, Any]:
    return {"error": "wrong_type", "message": message}
