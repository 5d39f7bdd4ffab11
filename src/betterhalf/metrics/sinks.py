"""Sinks of metrics: one row for each step in `metrics.jsonl`, and TensorBoard events on request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from betterhalf.errors import MissingExtraError
from betterhalf.metrics.catalogue import check_known

MetricValue = float | str | None
"""A number; a name, such as that of a parameter; or None for what this step could not measure."""


TENSORBOARD_MISSING = (
    "logging.tensorboard=true needs the package tensorboard, which is not installed. "
    "Install it with `pip install 'betterhalf[tensorboard]'`."
)
"""Message of the error without the package `tensorboard`."""


class MetricSink(Protocol):
    """Receiver of the metrics of one step at a time."""

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Record the metrics of `step`; steps count from 1."""
        ...

    def close(self) -> None:
        """Flush and release resources; a second call does nothing."""
        ...


class JsonlSink:
    """Sink of one flat JSON object for each step, `step` first, NaN and infinity as null. Every report reads this
    file."""

    def __init__(self, append: Callable[[Mapping[str, Any]], None]) -> None:
        """`append` writes one row to disk before it returns, non-finite numbers as null: `RunDir.append_metrics`."""
        self._append = append

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Append one row.

        Raises:
            ValueError: a name is not in the catalogue.
            RunError: the disk is full.
        """
        check_known(metrics)
        self._append({"step": step, **metrics})

    def close(self) -> None:
        """Do nothing: each row is already on disk."""


class TensorBoardSink:
    """Sink of TensorBoard event files. It uses the `tensorboard` package alone, as torch's wrapper would import
    torch."""

    def __init__(self, folder: Path) -> None:
        """Open an event file in `folder`.

        Raises:
            MissingExtraError: the package `tensorboard` is not installed.
        """
        try:
            from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
            from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
            from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError(TENSORBOARD_MISSING) from error
        self._event, self._summary = Event, Summary
        self._writer: Any = EventFileWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Write one event with every number of the step to disk."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Sinks:
    """Several sinks: the record first, then extras. An extra sink that fails is dropped with a warning."""

    def __init__(
        self, record: MetricSink, extras: Sequence[MetricSink] = (), *, warn: Callable[[str], None] | None = None
    ) -> None:
        """An error of `record` is raised; `warn` shows one line to the user, by default on standard error."""
        self._record = record
        self._extras = list(extras)
        self._warn = warn or _to_stderr

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Write the metrics of `step` to all sinks.

        Raises:
            RunError: the record could not be written.
        """
        self._record.write(step, metrics)
        for sink in tuple(self._extras):
            self._guard(sink, lambda sink=sink: sink.write(step, metrics))  # type: ignore[misc]

    def close(self) -> None:
        """Close all sinks, the record last and in any case."""
        for sink in tuple(self._extras):
            self._guard(sink, sink.close)
        self._record.close()

    def _guard(self, sink: MetricSink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._extras.remove(sink)
            self._warn(f"warning: {type(sink).__name__} failed and is switched off for the rest of the run: {error}")


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)
