"""TensorBoard: event files in the run folder. It uses the package `tensorboard` alone; torch's wrapper loads torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from betterhalf.run_dir import RunDir
from betterhalf.tracking.tracker import TrackedRun, Value, alarm_text, plain
from betterhalf.types import RunStatus


class TensorBoardRun:
    """One run of TensorBoard: the folder `tensorboard` of the run."""

    takes_late_rows = True

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        """Open an event file; that of a continued run follows the earlier ones."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import summary_v2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = RunDir(Path(run.folder)).tensorboard
        self._event, self._summary = Event, Summary
        self._writer: Any = EventFileWriter(str(folder))
        self.identity = {"folder": str(folder)}
        self.place = f"tensorboard --logdir {folder}"
        if not earlier:
            self._text("config", _code(run.config), 0)
            self._text("contract", _code(run.contract), 0)
            self._text("environment", _code(run.environment), 0)
            self._add(summary_v2.hparams_pb(plain(run.config)), 0)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Write one event with every number of the step, and one for each text, to disk."""
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(self._summary(value=values), step)
        for name in metrics.keys() - numbers.keys():
            self._text(name, str(metrics[name]), step)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Write the alarm as text."""
        self._text("watchdog", f"**{alarm['action']}** {alarm_text(alarm)}", alarm["step"])

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        """Write the summary as text, and close the file."""
        self._text("summary", _code({"status": status, **summary}), int(summary.get("steps", 0)))
        self._writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(display_name=tag, description="")
        tensor = make_tensor_proto([text])
        self._add(self._summary(value=[self._summary.Value(tag=tag, metadata=metadata, tensor=tensor)]), step)

    def _add(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()


def _code(content: Mapping[str, Any]) -> str:
    """Return JSON as Markdown, which the text page shows."""
    return f"```\n{json.dumps(content, indent=2)}\n```"
