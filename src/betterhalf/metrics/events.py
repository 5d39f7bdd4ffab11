"""Progress of a child process as events for its parent: JSON text sequences (RFC 7464) on standard error.

    {"step": 3, "metrics": {...}}                      one more step
    {"note": "..."}                                    one line, or a table, for people
    {"warning": "..."}                                 one line for people that is shown even in the mode `quiet`
    {"phase": "final accuracy", "done": 8, "total": 320}
    {"error": "RewardError", "message": "..."}         the reason why the process ends

A process that shows several runs passes their events on, with the name of the run under `run`. Anything else that the
child writes is not an event and is left as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, TextIO

VARIABLE = "BETTERHALF_EVENTS"
"""Environment variable that makes a process show its progress as events."""

_MARK = "\x1e"


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if the parent process asked for events."""
    return environment.get(VARIABLE) == "1"


def emit(out: TextIO, event: Mapping[str, Any]) -> None:
    """Write one event and flush."""
    out.write(f"{_MARK}{json.dumps(event)}\n")
    out.flush()


def parse(line: str) -> dict[str, Any] | None:
    """Return the event in a line; None for any other output."""
    if not line.startswith(_MARK):
        return None
    try:
        event = json.loads(line[len(_MARK) :])
    except ValueError:
        return None  # cut off by the end of the process
    return event if isinstance(event, dict) else None
