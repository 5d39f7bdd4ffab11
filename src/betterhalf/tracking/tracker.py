"""Description of a run for its trackers, and the protocol that each of them implements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from betterhalf.types import RunStatus

Value = float | str
"""A number, or a name such as that of a parameter. What a step could not measure is not sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Description of a run, as JSON values: it travels to the process of each tracker."""

    name: str
    """Name of the run in the tracker."""
    folder: str
    """Absolute path of the run folder."""
    kind: str
    """`train`, `arm` or `cell`."""
    part_of: str | None
    """Name of the sanity run or the sweep that the run is a part of; None for a run of its own."""
    project: str | None
    """Project; None for that of the tracker's environment, or the default."""
    group: str | None
    """Group; None for that of the tracker's environment, or `part_of`."""
    tags: list[str]
    """Tags."""
    mode: str | None
    """Mode of W&B; None for that of its environment."""
    prometheus_host: str
    """Address of the endpoint that Prometheus reads."""
    prometheus_port: int
    """First port that may be used."""
    steps: int
    """Number of steps of the whole run."""
    config: dict[str, Any]
    """Resolved configuration."""
    contract: dict[str, Any]
    """Content of `contract.json`."""
    environment: dict[str, Any]
    """Content of `environment.json`."""

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with the verdict of the contract, a line for each region, and the environment."""
        rows = {
            row["region"]: f"{row['trainer']} | {row['engine']} | {row['status']}"
            for row in self.contract.get("rows", [])
        }
        verdict = {"ok": self.contract.get("ok"), "first_difference": self.contract.get("first_difference"), **rows}
        return {**self.config, "contract": verdict, "environment": self.environment}


class Tracker(Protocol):
    """One run in one tracker. Any method may raise or hang: the run does not notice."""

    identity: dict[str, str]
    """Everything that finds the run again, to continue it."""
    place: str
    """Address, path or command with which the user finds the run."""
    takes_late_rows: bool
    """True if a row may follow that of a later step."""

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Send the metrics of a step."""
        ...

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Send an alarm of the watchdog: a row of `watchdog.jsonl`."""
        ...

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        """Send the run's summary and the way it ended, and flush everything that waits."""
        ...


def plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Return the numbers, truth values and texts in nested mappings by their dotted names."""
    found: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= plain(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float, str)):
            found[f"{prefix}{name}"] = value
    return found


def alarm_title(alarm: Mapping[str, Any]) -> str:
    """Return the title of an alarm, such as `watchdog (warn): mismatch/k3/mean`."""
    return f"watchdog ({alarm['action']}): {alarm['metric']}"


def alarm_text(alarm: Mapping[str, Any]) -> str:
    """Return an alarm as a sentence."""
    return f"step {alarm['step']}: {alarm['reason']}"
