"""The object inside each process that Ray starts: it holds one rank or engine, and returns errors as values.

An error that Ray carries is an error of Ray with the text of a traceback; as a value it arrives as it was raised.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Facts about a process, for messages and for its end."""

    host: str
    """Name of its host."""
    node: str
    """Ray's identifier of the host."""
    pid: int
    log: str
    """Path, on its host, of the file with its standard error; empty if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of one call: a value, or the error that the call raised."""

    value: Any = None
    error: Exception | None = None


class Host:
    """Holder of the object of one process. Ray runs its methods one at a time, in order."""

    def __init__(self, folder: str) -> None:
        """Work in the run's current folder, where this host has it: a configuration may hold relative paths."""
        with suppress(OSError):
            os.chdir(folder)
        self._object: Any = None
        self._failed: Exception | None = None

    def about(self) -> About:
        """Return what this process is."""
        import ray

        node = str(ray.get_runtime_context().get_node_id())
        return About(host=socket.gethostname(), node=node, pid=os.getpid(), log=_own_log())

    def build(self, build: Callable[..., object], arguments: Mapping[str, Any]) -> None:
        """Make the object; an error is raised by every later call."""
        try:
            self._object = build(**arguments)
        except Exception as error:
            self._failed = _portable(error)

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Outcome:
        """Call a method of the object."""
        if self._failed is not None:
            return Outcome(error=self._failed)
        try:
            return Outcome(value=getattr(self._object, method)(*arguments, **keywords))
        except Exception as error:
            return Outcome(error=_portable(error))


def _own_log() -> str:
    """Return the file that standard error goes to; empty where that is unknown."""
    path = Path("/proc/self/fd/2")
    with suppress(OSError):
        target = path.readlink()
        return str(target) if target.is_file() else ""
    return ""


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent, with its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    error.__cause__ = error.__context__ = error.__traceback__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
