"""All trackers of one run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty
from typing import Any

from betterhalf.tracking.feed import Feed
from betterhalf.tracking.kinds import TRACKERS
from betterhalf.tracking.tracker import TrackedRun
from betterhalf.types import RunStatus, TrackerName

_INTERRUPTED_SECONDS = 5.0
"""Longest wait for trackers after Ctrl-C or SIGTERM."""


class Tracking:
    """Sender to the trackers of one run; without trackers it does nothing."""

    def __init__(
        self,
        names: Sequence[TrackerName],
        run: TrackedRun,
        folder: Path,
        *,
        timeout: float,
        backlog: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start the trackers.

        Args:
            names: the trackers.
            run: description of the run.
            folder: folder for their records.
            timeout: longest wait at the end of the run, in seconds.
            backlog: rows of `metrics.jsonl` so far; those that a tracker lacks are sent to it.
        """
        messages = [_row(row["step"], row) for row in backlog]
        self._feeds = [Feed(name, TRACKERS[name].place, run, folder / name, messages) for name in names]
        self._timeout = timeout

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step."""
        for feed in self._feeds:
            feed.send(_row(step, metrics))

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Send an alarm of the watchdog: a row of `watchdog.jsonl`."""
        for feed in self._feeds:
            feed.send({"alarm": alarm})

    def notes(self) -> Iterator[str]:
        """Yield the messages for the user since the last call."""
        for feed in self._feeds:
            with suppress(Empty):
                while True:
                    yield feed.notes.get_nowait()

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        """Send the end of the run, and wait for all trackers together, no longer than the timeout."""
        wait = min(self._timeout, _INTERRUPTED_SECONDS) if status == "interrupted" else self._timeout
        deadline = time.monotonic() + wait
        for feed in self._feeds:
            feed.close_input({"status": status, "summary": summary})
        with ExitStack() as closing:
            for feed in reversed(self._feeds):
                closing.callback(feed.close, deadline)


def _row(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": step, "metrics": {name: value for name, value in metrics.items() if name != "step"}}
