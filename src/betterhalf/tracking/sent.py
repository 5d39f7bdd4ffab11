"""Record of what a tracker was sent, as rows of a file in the run folder, so that nothing is sent twice.

{"identity": {...}}                     the tracker's names for the run
{"step": 3}                             its row arrived
{"alarm": [3, "mismatch/k3/mean", "warn"]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from betterhalf.run_dir import append_jsonl, read_jsonl


class Sent:
    """Record of one tracker; it survives the end of any process."""

    def __init__(self, path: Path) -> None:
        """Read the record of earlier processes, if there is one."""
        self._path = path
        self.identity: dict[str, str] = {}
        """Names of the run in the tracker, from the last process that opened it; empty before the first."""
        self.steps: set[int] = set()
        """Steps whose rows arrived."""
        self._alarms: set[tuple[Any, ...]] = set()
        for row in read_jsonl(path):
            self.identity = row.get("identity", self.identity)
            self.steps |= {row["step"]} if "step" in row else set()
            self._alarms |= {tuple(row["alarm"])} if "alarm" in row else set()

    @property
    def last_step(self) -> int:
        """Last step that arrived; -1 before the first."""
        return max(self.steps, default=-1)

    def opened(self, identity: Mapping[str, str]) -> None:
        """Record the names of the run."""
        self.identity = dict(identity)
        append_jsonl(self._path, {"identity": self.identity})

    def row(self, step: int) -> None:
        """Record that the row of a step arrived."""
        self.steps.add(step)
        append_jsonl(self._path, {"step": step})

    def holds_alarm(self, alarm: Mapping[str, Any]) -> bool:
        """Return True if the alarm arrived earlier."""
        return _key(alarm) in self._alarms

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Record that an alarm arrived."""
        self._alarms.add(_key(alarm))
        append_jsonl(self._path, {"alarm": _key(alarm)})


def _key(alarm: Mapping[str, Any]) -> tuple[Any, ...]:
    return alarm["step"], alarm["metric"], alarm["action"]
