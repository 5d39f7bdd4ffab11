"""A training run in its trackers: what they are sent at its start and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.errors import WatchdogError
from betterhalf.metrics.console import show_note
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.tracking.tracker import TrackedRun
from betterhalf.tracking.tracking import Tracking
from betterhalf.types import RunKind, RunStatus


@contextmanager
def tracked(config: RunConfig, run: RunDir, label: str, kind: RunKind) -> Iterator[Tracking]:
    """Send a run to its trackers while the body trains it and writes its summary; at the end, note what they lack."""
    settings = config.logging
    tracking = Tracking(
        settings.trackers,
        describe(config, run, label, kind),
        run.tracking,
        timeout=settings.tracker_timeout,
        backlog=read_jsonl(run.metrics) if settings.trackers else (),
    )
    status: RunStatus = "failed"
    try:
        yield tracking
        status = "finished"
    except WatchdogError:
        status = "stopped"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        try:
            tracking.finish(status, read_json(run.summary) if run.summary.exists() else {})
        finally:
            for note in tracking.notes():
                show_note(note, mode=settings.console)


def describe(config: RunConfig, run: RunDir, label: str, kind: RunKind) -> TrackedRun:
    """Return the description of a run for its trackers.

    An arm or a cell has the name of its whole run before its own, and the folder of that run as its group.
    """
    settings, whole = config.logging, None if kind == "train" else run.path.absolute().parent.parent
    return TrackedRun(
        name=config.name if whole is None else f"{config.name}-{label}",
        folder=str(run.path.absolute()),
        kind=kind,
        part_of=None if whole is None else whole.name,
        project=settings.project,
        group=settings.group,
        tags=list(settings.tags),
        mode=settings.mode,
        prometheus_host=settings.prometheus_host,
        prometheus_port=settings.prometheus_port,
        steps=config.training.steps,
        config=resolved_json(config),
        contract=read_json(run.contract) if run.contract.exists() else {},
        environment=read_json(run.environment) if run.environment.exists() else {},
    )
