"""A process that outlives the run for a moment: once the run has ended, it kills what the run's workers left behind.

A run that is killed cannot do this. Nor can a worker: in the middle of a long multiplication it runs no other thread,
and a process that has left its session does not get the signals sent to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from betterhalf.tasks.worker_process import kill_marked, module_path

_SCRIPT = "import sys; sys.path[:] = {path!r}; from betterhalf.tasks.worker_janitor import main; main({mark!r})"


class Janitor:
    """The process, as long as the pool of workers is open."""

    def __init__(self, mark: str) -> None:
        """Start the process.

        Args:
            mark: beginning of the marks of the workers.
        """
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SCRIPT.format(path=module_path(), mark=mark)],
                stdin=lifeline,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(lifeline)

    def close(self) -> None:
        """End the process; the workers have ended already."""
        self._process.kill()
        self._process.wait()
        os.close(self._lifeline)


def main(mark: str) -> None:
    """Wait for the end of standard input, which the run holds open, and kill the processes marked with `mark`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    kill_marked(mark)
