"""The section `[logging]`: terminal output, trackers and extra records.

The file is not called `logging.py`, so that nothing mistakes it for the standard library's module.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import ConsoleMode, TrackerMode, TrackerName


class LoggingConfig(Section):
    """Terminal output, trackers and extra records."""

    console: ConsoleMode = "auto"
    """Progress on the terminal: a `live` dashboard, plain `lines`, or none (`quiet`). `auto`: `live` on a terminal,
    `lines` elsewhere. Warnings, such as alarms of the watchdog, show in every mode."""
    trackers: tuple[TrackerName, ...] = ()
    """Trackers that also get the run; each needs the extra of its name. None of them can stop or slow the run."""
    project: str | None = None
    """Project in the trackers; absent for that of the tracker's own environment variable, or else `betterhalf`."""
    group: str | None = None
    """Group of the run in the trackers; absent for that of the tracker's own environment variable, or else the folder
    of the sanity run or the sweep that the run is a part of."""
    tags: tuple[str, ...] = ()
    """Tags of the run in the trackers."""
    mode: TrackerMode | None = None
    """Mode of W&B. `offline` writes files for `wandb sync` into the run folder; absent for that of `WANDB_MODE`."""
    tracker_timeout: float = Field(30.0, ge=0)
    """Longest time that the end of a run waits for trackers, in seconds; it then says what they lack."""
    prometheus_host: str = "127.0.0.1"
    """Address on which `prometheus` answers; `0.0.0.0` for other machines as well, which need no password."""
    prometheus_port: int = Field(9464, ge=1, le=65520)
    """Port of `prometheus`; the next free one if another run has it."""
    rollouts_per_step: int = Field(2, ge=0)
    """Number of rollouts that each step keeps in `rollouts.jsonl`, with per-token columns."""

    @model_validator(mode="after")
    def _name_each_once(self) -> Self:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"logging.trackers={','.join(self.trackers)} names a tracker twice. Name each once.")
        return self
