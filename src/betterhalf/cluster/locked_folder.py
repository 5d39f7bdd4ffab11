"""Temporary folders that are locked while their process runs; a later process removes those that are left over."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from pathlib import Path

_LOCK = "in-use"
_NEW_SECONDS = 60.0
"""Age in seconds below which a folder without a lock may belong to a process that is just starting."""


class LockedFolder:
    """A temporary folder that is locked while this process lives; the lock ends with it, even by `kill -9`."""

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        """Create the folder, and remove those with the same prefix whose processes have ended.

        Args:
            prefix: beginning of the folder's name.
            parent: folder in which it is created; by default the system's folder of temporary files.
        """
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _remove_left_over(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._lock = (self.path / _LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    @property
    def empty(self) -> bool:
        """True if the folder holds nothing but its lock."""
        return all(entry.name == _LOCK for entry in self.path.iterdir())

    def remove(self) -> None:
        """Remove the folder with everything in it; calling it twice is harmless."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_left_over(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    """Return whether no process holds the lock of `folder`."""
    try:
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        try:
            return time.time() - folder.stat().st_mtime > _NEW_SECONDS
        except OSError:
            return False
    except OSError:
        return False
