"""Temporary folder for the sockets and logs of a local Ray, and the environment variable that marks its processes.

If the run is killed with `kill -9`, a janitor process ends Ray's remaining processes, which would otherwise wait a
minute for the head that ended with the run. A later run removes the folder.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from betterhalf.cluster.locked_folder import LockedFolder
from betterhalf.tasks.worker_channel import MARK
from betterhalf.tasks.worker_janitor import Janitor
from betterhalf.tasks.worker_process import kill_marked

_PREFIX = "betterhalf-ray-"
_LONGEST = 40
"""Maximum length in bytes of the folder's path, so that Ray's sockets in it stay within the 107 bytes of a Unix
socket's path."""


class SessionFolder:
    """A folder of a local Ray, and the janitor of its processes."""

    def __init__(self) -> None:
        """Create the folder, and remove those of processes that have ended."""
        self._folder = LockedFolder(_PREFIX, _parent())
        self.path = self._folder.path
        self._mark = uuid.uuid4().hex
        self._janitor: Janitor | None = Janitor(self._mark)

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Return a context in which started processes inherit the mark, and pass it on to their own."""
        # Ray's process titles overwrite the environment, and with it the mark, unless SPT_NOENV is set.
        wanted = {MARK: self._mark, "SPT_NOENV": "1"}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def remove(self) -> None:
        """End every process with the mark, and remove the folder; calling it twice is harmless."""
        if self._janitor is None:
            return
        kill_marked(self._mark)
        self._janitor.close()
        self._janitor = None
        self._folder.remove()


def _parent() -> Path:
    """Return the folder of temporary files, or `/tmp` if its path is too long for sockets."""
    usual = Path(tempfile.gettempdir())
    return usual if len(os.fsencode(usual)) + len(_PREFIX) + 8 <= _LONGEST else Path("/tmp")
