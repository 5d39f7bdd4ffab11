"""W&B: a run online, or its files in the run folder for `wandb sync`.

Its environment variables take precedence over defaults, but not over settings of `[logging]`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from betterhalf.tracking.tracker import TrackedRun, Value, alarm_text, alarm_title, plain
from betterhalf.types import RunStatus

_EXIT_CODES: dict[RunStatus, int] = {"finished": 0, "stopped": 1, "failed": 1, "interrupted": 255}


class WandbRun:
    """One run of W&B."""

    takes_late_rows = False  # W&B ignores a row whose step is below its last one

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        """Start the run, or continue the one of `earlier`. What the environment sets is left to W&B."""
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.init(
            id=earlier.get("id"),
            resume="allow" if earlier else None,
            project=run.project or _unless("WANDB_PROJECT", "betterhalf"),
            name=_unless("WANDB_NAME", run.name),
            group=run.group or _unless("WANDB_RUN_GROUP", run.part_of),
            job_type=_unless("WANDB_JOB_TYPE", run.kind),
            tags=run.tags or None,
            mode=run.mode,
            dir=_unless("WANDB_DIR", run.folder),
            config=run.settings,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.identity = {"id": str(self._run.id)}
        self.place = str(self._run.url or self._run.settings.sync_dir)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Send a row, committed at once: otherwise the last one would wait for the next."""
        self._run.log(dict(metrics), step=step, commit=True)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Send an alert, which W&B passes on by mail or chat."""
        levels = self._wandb.AlertLevel
        level = levels.ERROR if alarm["action"] == "stop" else levels.WARN
        self._run.alert(title=alarm_title(alarm), text=alarm_text(alarm), level=level, wait_duration=1)

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        """Write the summary, and wait until everything is sent."""
        self._run.summary.update({f"summary/{name}": value for name, value in plain(summary).items()})
        self._run.finish(exit_code=_EXIT_CODES[status])


def _unless(variable: str, value: str | None) -> str | None:
    """Return `value`, unless the environment has the variable: W&B then reads that itself."""
    return None if os.environ.get(variable) else value
