"""Trackers for tests, which processes of their own load from this file: one that works, and some that do not."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from betterhalf.tracking.tracker import TrackedRun, Value
from betterhalf.types import RunStatus


class Keeps:
    """Writes everything that it gets to `kept.jsonl` in the run folder."""

    takes_late_rows = True

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        self._path = Path(run.folder) / "kept.jsonl"
        self.identity = dict(earlier) or {"id": "first"}
        self.place = f"the file {self._path}"
        self._add({"opened": dict(earlier), "name": run.name, "group": run.group or run.part_of, "kind": run.kind})

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        self._add({"step": step, **metrics})

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        self._add({"alarm": alarm["metric"]})

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        self._add({"status": status, "steps": summary.get("steps")})

    def _add(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class InOrder(Keeps):
    """Takes no row after one of a later step."""

    takes_late_rows = False


class Slow(Keeps):
    """Takes a second over each row."""

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        time.sleep(1.0)
        super().log(step, metrics)


class Hangs(Keeps):
    """Never answers, as a library without a network."""

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        time.sleep(3600)


class RaisesAtOpen(Keeps):
    """Cannot open its run."""

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        raise OSError("no route to the server")


class RaisesAtOddRows(Keeps):
    """Refuses every second row."""

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        if step % 2:
            raise OSError("no route to the server")
        super().log(step, metrics)
