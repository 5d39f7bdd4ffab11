"""MLflow: the tracking server or the local store that `MLFLOW_TRACKING_URI` names."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from betterhalf.tracking.tracker import TrackedRun, Value, alarm_text, plain
from betterhalf.types import RunStatus

_STATES: dict[RunStatus, str] = {
    "finished": "FINISHED",
    "stopped": "FAILED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_PARAMS_AT_ONCE = 100
_PARAM_LENGTH = 6000
_TRIES = 5
_NOTE = "mlflow.note.content"
"""Tag with the description that MLflow shows on top of a run."""


class MlflowRun:
    """One run of MLflow, through its client: no global state, and every call is answered before it returns."""

    takes_late_rows = True

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        """Start the run, or continue the one of `earlier`."""
        import mlflow
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        uri = earlier.get("uri") or mlflow.get_tracking_uri()
        self._client: Any = _connected(MlflowClient(tracking_uri=uri))
        self._metric: Any = Metric
        self._id = earlier.get("run_id") or self._create(run)
        if earlier:
            self._client.update_run(self._id, status="RUNNING")
        tags = self._client.get_run(self._id).data.tags
        self._notes = tags[_NOTE].split("\n\n") if _NOTE in tags else []
        self.identity = {"uri": uri, "run_id": self._id}
        self.place = f"run {self._id} of {uri}"

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Send the numbers of a step; MLflow's metrics hold no text."""
        self._send({name: float(value) for name, value in metrics.items() if not isinstance(value, str)}, step)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Add the alarm to the description of the run, and name its metric in a tag to search for."""
        self._notes.append(f"**watchdog ({alarm['action']})** {alarm_text(alarm)}")
        self._client.set_tag(self._id, _NOTE, "\n\n".join(self._notes))
        self._client.set_tag(self._id, "watchdog", alarm["metric"])

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        """Send the summary, its numbers as metrics, and the state of the run."""
        found = plain(summary)
        numbers = {f"summary/{name}": float(value) for name, value in found.items() if not isinstance(value, str)}
        self._send(numbers, int(summary.get("steps", 0)))
        self._keep("summary.json", summary)
        self._client.set_terminated(self._id, _STATES[status])

    def _create(self, run: TrackedRun) -> str:
        project = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "betterhalf"
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") if run.project is None else None
        group = {"group": name} if (name := run.group or run.part_of) else {}
        tags = {"kind": run.kind, **group, **dict.fromkeys(run.tags, "true")}
        name = os.environ.get("MLFLOW_RUN_NAME") or run.name
        created = self._client.create_run(experiment or self._experiment(project), tags=tags, run_name=name)
        identity: str = created.info.run_id
        self._id = identity
        self._describe(run)
        return identity

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except Exception:  # another run, side by side, was first
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _describe(self, run: TrackedRun) -> None:
        from mlflow.entities import Param

        params = iter(plain(run.settings).items())
        while batch := list(islice(params, _PARAMS_AT_ONCE)):
            self._client.log_batch(self._id, params=[Param(key, str(value)[:_PARAM_LENGTH]) for key, value in batch])
        for name in ("config", "contract", "environment"):
            self._keep(f"{name}.json", getattr(run, name))

    def _send(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics: Sequence[Any] = [self._metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def _keep(self, name: str, content: Mapping[str, Any]) -> None:
        """Store a file with the run. A server may take metrics, but give no access to its files."""
        try:
            self._client.log_dict(self._id, dict(content), name)
        except Exception as error:
            print(f"{name} is not stored: {error}", file=sys.stderr)


def _connected(client: Any) -> Any:
    """Return the client once its store answers, or after a few tries.

    Arms that start side by side create a local store at the same time.
    """
    for _ in range(_TRIES - 1):
        try:
            client.search_experiments(max_results=1)
            break
        except Exception as error:
            print(f"the store does not answer yet: {error}", file=sys.stderr)
            time.sleep(1.0)
    return client
