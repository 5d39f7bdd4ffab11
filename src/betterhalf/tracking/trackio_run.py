"""Trackio: its local database, or a Hugging Face Space if `TRACKIO_SPACE_ID` names one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

from betterhalf.tracking.tracker import TrackedRun, Value, alarm_text, alarm_title, plain
from betterhalf.types import RunStatus


class TrackioRun:
    """One run of Trackio."""

    takes_late_rows = True

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        """Start the run, or continue the one of `earlier`; Trackio finds it by its name, which is therefore unique."""
        import trackio

        name = earlier.get("name") or f"{run.name}-{uuid.uuid4().hex[:6]}"
        project = earlier.get("project") or run.project or os.environ.get("TRACKIO_PROJECT") or "betterhalf"
        self._alarm_level = trackio.AlertLevel
        self._run: Any = trackio.init(
            project=project,
            name=name,
            group=run.group or run.part_of,
            config={**run.settings, "tags": run.tags},
            resume="allow" if earlier else "never",
            embed=False,
        )
        self.identity = {"project": project, "name": name}
        self.place = f"trackio show --project {project}, run {name}"

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Add a row."""
        self._run.log(dict(metrics), step=step)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Add an alert, which the dashboard shows."""
        level = self._alarm_level.ERROR if alarm["action"] == "stop" else self._alarm_level.WARN
        self._run.alert(title=alarm_title(alarm), text=alarm_text(alarm), level=level, step=alarm["step"])

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        """Add the summary of a finished run as a row, as Trackio has no other place; wait until all is written."""
        if status == "finished":
            step = int(summary["steps"])
            self._run.log({f"summary/{name}": value for name, value in plain(summary).items()}, step=step)
        self._run.finish()
