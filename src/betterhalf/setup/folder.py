"""The folder of a run, created before anything expensive, and removed if nothing was written to it."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from betterhalf.run_dir import RunDir
from betterhalf.run_lock import run_lock

_RESUMABLE = ("train", "sanity", "evaluate", "sweep")
"""Verbs that take --resume."""


def default_run_dir(verb: str, name: str) -> Path:
    """Return `runs/<verb>-<name>-<time>`, in local time to the second, with a number appended if that exists."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    base = Path("runs", f"{verb}-{safe}-{time.strftime('%Y%m%d-%H%M%S')}")
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


@contextmanager
def run_folder(run_dir: str | None, verb: str, name: str, *, resume: bool = False) -> Iterator[RunDir]:
    """Create the folder at `run_dir`, or at `runs/<verb>-<name>-<time>`, and yield it.

    Bad input is often found only when model and data are read. If nothing has been written when the body ends, the
    folders created here are removed, so that a corrected command can use the same path.

    Raises:
        InputError, RunError: see `RunDir.create` and `run_lock`.
        KeyboardInterrupt: the body was interrupted, or ended by SIGTERM (`process.Terminated`); the message names the
            folder if it holds something.
    """
    path = Path(run_dir) if run_dir else default_run_dir(verb, name)
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        run = RunDir.create(path, resume=resume)
        with run_lock(run.path):
            yield run
    except KeyboardInterrupt as interrupt:
        if path.is_dir() and any(path.iterdir()):
            go_on = "; --resume continues it" if verb in _RESUMABLE else ""
            words = str(interrupt) or "interrupted"
            raise type(interrupt)(f"{words}; finished work is in {path}{go_on}") from interrupt
        raise
    finally:
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove the folders, innermost first, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
