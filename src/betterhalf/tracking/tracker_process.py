"""The process of one tracker.

`python -m betterhalf.tracking.tracker_process PLACE RECORD` reads messages, a line of JSON each, from standard input:

    {"run": {...}}                              first: what to open
    {"step": 3, "metrics": {...}}
    {"alarm": {...}}
    {"end": {"status": "finished", "summary": {...}}}

and answers with {"opened": ...}, {"sent": 3}, {"late": 2} or {"failed": "reason"} on standard output. Whatever the
tracker's own library prints goes to standard error. If the input ends without `end`, the run was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from betterhalf.errors import InputError
from betterhalf.run_lock import run_lock
from betterhalf.tracking.kinds import open_tracker
from betterhalf.tracking.sent import Sent
from betterhalf.tracking.tracker import TrackedRun, Tracker
from betterhalf.types import RunStatus

_NICENESS = 5
_PATIENCE_SECONDS = 30.0


class Session:
    """A tracker's run, and the record of what it was sent."""

    def __init__(self, tracker: Tracker, sent: Sent, answers: TextIO) -> None:
        """Announce the opened run; `answers` goes to the process of the run."""
        self._tracker, self._sent, self._answers = tracker, sent, answers
        self.ended = False
        """True after the message that ends the run."""
        sent.opened(tracker.identity)
        self._answer(opened=tracker.place)

    def take(self, message: dict[str, Any]) -> None:
        """Carry out one message; an error of the tracker concerns that message alone."""
        try:
            if "step" in message:
                self._row(message["step"], message["metrics"])
            elif "alarm" in message:
                self._alarm(message["alarm"])
            elif "end" in message:
                self.ended = True
                self.finish(message["end"]["status"], message["end"]["summary"])
        except Exception as error:
            traceback.print_exc()
            self._answer(failed=f"{type(error).__name__}: {error}")

    def finish(self, status: RunStatus, summary: dict[str, Any]) -> None:
        """End the tracker's run."""
        self._tracker.finish(status, summary)

    def _row(self, step: int, metrics: dict[str, Any]) -> None:
        """Send a row, unless it arrived before the run was resumed or its trainer restarted."""
        if step not in self._sent.steps:
            if not self._tracker.takes_late_rows and step < self._sent.last_step:
                self._answer(late=step)
                return
            self._tracker.log(step, {name: value for name, value in metrics.items() if value is not None})
            self._sent.row(step)
        self._answer(sent=step)

    def _alarm(self, alarm: dict[str, Any]) -> None:
        if not self._sent.holds_alarm(alarm):
            self._tracker.alarm(alarm)
            self._sent.alarm(alarm)

    def _answer(self, **answer: Any) -> None:
        # The process of the run may have been killed: the tracker still gets what is on its way.
        with contextlib.suppress(BrokenPipeError):
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


def main() -> int:
    """Serve one run, and return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process of the run says when to end
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    place, record = sys.argv[1], Path(sys.argv[2])
    answers = _own_output()
    messages = _messages(sys.stdin)
    with _alone(record.parent):
        sent = Sent(record)
        run = TrackedRun(**next(messages)["run"])
        session = Session(open_tracker(place, run, sent.identity), sent, answers)
        for message in messages:
            session.take(message)
        if not session.ended:
            session.finish("failed", {})
    return 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for the process of a killed run, which may still send what was on its way.

    Raises:
        InputError: it has not ended after 30 seconds.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(run_lock(folder))
                break
            except InputError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield


def _messages(lines: TextIO) -> Iterator[dict[str, Any]]:
    """Yield the messages; an incomplete last line, from a run whose process was killed, is ignored."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _own_output() -> TextIO:
    """Take standard output away from libraries, and return it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main())
