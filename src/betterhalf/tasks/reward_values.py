"""Read the rewards that a user's function returned: numbers, or named components."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from betterhalf.tasks.worker_channel import MAX_COMPONENTS, MAX_NAME_LENGTH, MAX_REWARD

TOTAL = "reward"
"""Key of a dictionary of components that gives the reward; without it, the reward is their sum."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class _BadReward(Exception):
    """One reward cannot be used."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_rewards(given: Any, count: int) -> dict[str, Any]:
    """Return the rewards of `count` completions as a JSON reply: `rewards`, or `error` and `message`.

    Each reward is {"value", "components"}, or {"error", "message"} if it alone is bad. A number is anything that Python
    converts to a float without parsing text: an int, a bool (True is 1), a NumPy scalar, a tensor of one element.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return _failure("wrong_type", f"it returned {_shown(given)} for {count} completions, not a list")
    listed = list(islice(given, count + 1))
    if len(listed) != count:
        found = f"{len(listed)}" if len(listed) < count else f"more than {count}"
        return _failure("wrong_length", f"it returned {found} rewards for {count} completions")
    return {"rewards": [_one(value) for value in listed]}


def _one(value: Any) -> dict[str, Any]:
    try:
        return _read(value)
    except _BadReward as error:
        return _failure(error.kind, str(error))


def _failure(kind: str, message: str) -> dict[str, Any]:
    return {"error": kind, "message": message}


def _read(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"value": _number(value, "a reward"), "components": {}}
    if len(value) > MAX_COMPONENTS:
        raise _BadReward("too_large", f"it returned {len(value)} components, more than {MAX_COMPONENTS}")
    components = {_name(name): _number(part, f"component {name!r}") for name, part in value.items()}
    if not components:
        raise _BadReward("wrong_type", "it returned a dictionary without components")
    total = components.pop(TOTAL) if TOTAL in components else None
    found = math.fsum(components.values()) if total is None else total
    return {"value": found, "components": components, "summed": total is None}


def _name(name: Any) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH or _NAME.fullmatch(name) is None:
        raise _BadReward(
            "wrong_type",
            f"it named a component {_shown(name)}; use at most {MAX_NAME_LENGTH} letters, digits, _, - and .",
        )
    return name


def _number(value: Any, what: str) -> float:
    """Return a finite float."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise _BadReward("wrong_type", f"{what} is {_shown(value)}, not a number") from None
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise _BadReward("not_finite", f"{what} is {found}")
    if abs(found) > MAX_REWARD:
        raise _BadReward("too_large", f"{what} is {found:g}, beyond {MAX_REWARD:g} in size")
    return found


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"[:200]
