"""Ray actor that holds one rank or engine, and returns its errors as values.

Ray would wrap a raised error in an error of its own, with the traceback as text. An error that is returned as a value
keeps its type.
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
    """Identity of a process, for messages and for ending it."""

    host: str
    """Name of its host."""
    node: str
    """Ray's identifier of the host."""
    pid: int
    log: str
    """Path, on its host, of the file that receives its standard error; empty if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of one call: a value, or the error that the call raised."""

    value: Any = None
    error: Exception | None = None


class Host:
    """Actor that holds the object of one process. Ray runs its methods one at a time, in order, except calls aside."""

    def __init__(self, folder: str) -> None:
        """Change to the run's working folder if this host has it, because a configuration may hold relative paths."""
        with suppress(OSError):
            os.chdir(folder)
        self._object: Any = None
        self._failed: Exception | None = None

    def about(self) -> About:
        """Return host, pid and log of this process."""
        import ray

        node = str(ray.get_runtime_context().get_node_id())
        return About(host=socket.gethostname(), node=node, pid=os.getpid(), log=_own_log())

    def build(self, build: Callable[..., object], arguments: Mapping[str, Any]) -> None:
        """Build the object; if that fails, every later call returns the error."""
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
    """Return the path of the file that standard error is written to; empty if it is not a regular file."""
    path = Path("/proc/self/fd/2")
    with suppress(OSError):
        target = path.readlink()
        return str(target) if target.is_file() else ""
    return ""


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled, with its traceback as a note; a RuntimeError if the error itself cannot."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    error.__cause__ = error.__context__ = error.__traceback__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
