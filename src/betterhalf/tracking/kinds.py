"""The trackers by name: what each needs, and the checks of it before a run begins."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from betterhalf.config.run_logging import LoggingConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.tracking.prometheus_run import PORTS, free_port
from betterhalf.tracking.tracker import TrackedRun, Tracker
from betterhalf.types import TrackerName

_LOGIN_MODULE = "betterhalf.tracking.wandb_login"
_LOGIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerKind:
    """One kind of tracker."""

    package: str
    """Package that it needs; the extra that brings it has the name of the tracker."""
    place: str
    """`module:class` of its run, imported only in the tracker's own process."""
    refusal: Callable[[LoggingConfig], str | None] = lambda logging: None
    """Reason why it cannot be used as configured, with the fix; None if it can."""


def _wandb_refusal(logging: LoggingConfig) -> str | None:
    return _login_refusal(logging.mode, *(os.environ.get(name) for name in ("WANDB_MODE", "WANDB_API_KEY")))


@functools.cache
def _login_refusal(mode: str | None, *environment: str | None) -> str | None:
    """Ask W&B itself whether it has a login, in a process of its own: it needs seconds to import."""
    settings = {} if mode is None else {"WANDB_MODE": mode}
    command = [sys.executable, "-m", _LOGIN_MODULE]
    try:
        answer = subprocess.run(
            command,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LOGIN_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None  # a slow machine; the tracker's own process will find out
    if answer.returncode == 0:
        return None
    reason = (answer.stdout.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]
    return (
        f"logging.trackers names wandb, which is not logged in ({reason}). Run `wandb login`, set WANDB_API_KEY, or "
        "write files for `wandb sync` with logging.mode=offline."
    )


def _port_refusal(logging: LoggingConfig) -> str | None:
    host, first = logging.prometheus_host, logging.prometheus_port
    try:
        found = free_port(host, first)
    except OSError as error:
        return (
            f"logging.prometheus_host={host} cannot be listened on ({error.strerror}). Use 127.0.0.1, or an address of "
            "this machine."
        )
    if found is not None:
        return None
    last = first + PORTS - 1
    return f"no port from {first} to {last} is free. Set logging.prometheus_port to the first of {PORTS} others."


TRACKERS: Mapping[TrackerName, TrackerKind] = {
    "wandb": TrackerKind(package="wandb", place="betterhalf.tracking.wandb_run:WandbRun", refusal=_wandb_refusal),
    "trackio": TrackerKind(package="trackio", place="betterhalf.tracking.trackio_run:TrackioRun"),
    "mlflow": TrackerKind(package="mlflow", place="betterhalf.tracking.mlflow_run:MlflowRun"),
    "tensorboard": TrackerKind(package="tensorboard", place="betterhalf.tracking.tensorboard_run:TensorBoardRun"),
    "prometheus": TrackerKind(
        package="prometheus_client", place="betterhalf.tracking.prometheus_run:PrometheusRun", refusal=_port_refusal
    ),
}


def require_trackers(logging: LoggingConfig) -> None:
    """Refuse a tracker that cannot be used, before anything expensive.

    Raises:
        MissingExtraError: its package is not installed.
        InputError: it is not logged in, or cannot be used as configured.
    """
    for name in logging.trackers:
        kind = TRACKERS[name]
        if importlib.util.find_spec(kind.package) is None:
            raise MissingExtraError(
                f"logging.trackers names {name}, which needs the package {kind.package}, which is not installed. "
                f"Install it with `pip install 'betterhalf[{name}]'`."
            )
        if (refusal := kind.refusal(logging)) is not None:
            raise InputError(refusal)


def open_tracker(place: str, run: TrackedRun, earlier: Mapping[str, str]) -> Tracker:
    """Open the run of a tracker; `earlier` is the identity of the run to continue, empty for a new one."""
    module, _, name = place.partition(":")
    tracker: Tracker = getattr(importlib.import_module(module), name)(run, earlier)
    return tracker
