"""Each tracker's run, opened in that tool's own reader: rows, configuration, contract, alarms and summary, also after a
resume that repeats a step."""

from __future__ import annotations

import json
import struct
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.tracking.test_tracking import ALARM, described

from betterhalf.tracking.tracking import Tracking

pytestmark = pytest.mark.extra
LONG = 280.0
K3 = "mismatch/k3/mean"
CONTRACT = {
    "ok": True,
    "first_difference": None,
    "rows": [{"region": "compute", "trainer": "fp16", "engine": "fp16", "status": "equal"}],
}
SUMMARY = {"steps": 4, "mismatch_k3": 2e-5, "passed": True}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every tool's own folder inside that of the test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def track_twice(name: Any, folder: Path) -> None:
    """Track steps 1 to 3 of a run that then fails, and steps 2 to 4 of its continuation from step 1."""
    run = described(
        folder, project="half", group="grid", tags=["short"], mode="offline", contract=CONTRACT, part_of="folder"
    )
    for begin, numbers in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        backlog = [{"step": 1, K3: 1e-5}] if begin else []
        one = Tracking([name], run, folder / "tracking", timeout=LONG, backlog=backlog)
        for step in numbers:
            one.log(step, {K3: step * 1e-5, "optim/first_offender": "model.w" if step == 2 else None})
            if step == ALARM["step"]:
                one.alarm(ALARM)
        one.finish("finished" if begin else "failed", SUMMARY if begin else {})
        notes = list(one.notes())
        assert [note for note in notes if "warning" in note] == [], (folder / f"tracking/{name}/output.log").read_text()


def test_wandb_offline(in_folder: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    track_twice("wandb", in_folder)
    files = sorted(in_folder.glob("wandb/offline-run-*/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    runs, rows = of_kind(records, "run"), of_kind(records, "history")
    assert len(files) == 2
    assert {(run.run_id, run.project, run.run_group, run.job_type, run.display_name) for run in runs} == {
        (runs[0].run_id, "half", "grid", "train", "demo")
    }
    assert list(runs[0].tags) == ["short"]
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["contract"] == {"ok": True, "first_difference": None, "compute": "fp16 | fp16 | equal"}
    assert config["seed"] == 0
    found = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]
    assert [(row["_step"], row[K3]) for row in found] == [(step, step * 1e-5) for step in (1, 2, 3, 4)]
    assert [row.get("optim/first_offender") for row in found] == [None, "model.w", None, None]
    assert [(alert.title, alert.level) for alert in of_kind(records, "alert")] == [
        ("watchdog (warn): mismatch/k3/mean", "WARN")
    ]
    summary = {item.key: json.loads(item.value_json) for one in of_kind(records, "summary") for item in one.update}
    assert (summary["summary/mismatch_k3"], summary["summary/passed"]) == (2e-5, True)
    assert [record.exit_code for record in of_kind(records, "exit")] == [1, 0]


def wandb_records(file: Path) -> Iterator[Any]:
    """Read W&B's messages from its file: records in blocks of 32 KiB, as in a log of LevelDB.

    The package's reader is inside its binary, which talks to a server alone.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, part = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def test_trackio(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio", reason="needs the extra trackio")
    track_twice("trackio", in_folder)
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in (storage, pytest.importorskip("trackio.utils")):
        monkeypatch.setattr(module, "TRACKIO_DIR", in_folder / "trackio")
    (run,) = trackio.Api().runs("half")
    rows = storage.SQLiteStorage.get_logs("half", run.name, run_id=run.id)
    assert [(row["step"], row[K3]) for row in rows if K3 in row] == [(step, step * 1e-5) for step in (1, 2, 3, 4)]
    (summary,) = (row for row in rows if K3 not in row)
    assert (summary["step"], summary["summary/mismatch_k3"]) == (4, 2e-5)
    assert run.name.startswith("demo-")
    assert run.config["contract"]["compute"] == "fp16 | fp16 | equal"
    assert run.config["_Group"] == "grid"
    assert [(alert["title"], alert["step"], alert["level"]) for alert in run.alerts()] == [
        ("watchdog (warn): mismatch/k3/mean", 2, "warn")
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, for MLflow
def test_mlflow(in_folder: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("alembic", reason="needs the extra mlflow")
    track_twice("mlflow", in_folder)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{in_folder}/mlflow.db")
    experiment = client.get_experiment_by_name("half")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, K3)
    assert sorted((metric.step, metric.value) for metric in history) == [(step, step * 1e-5) for step in (1, 2, 3, 4)]
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params["contract.compute"] == "fp16 | fp16 | equal"
    assert run.data.tags["group"] == "grid"
    assert run.data.tags["short"] == "true"
    assert run.data.metrics["summary/mismatch_k3"] == 2e-5
    assert run.data.tags["mlflow.note.content"] == "**watchdog (warn)** step 2: too high"
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"config.json", "contract.json", "environment.json", "summary.json"}


def test_prometheus(in_folder: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra prometheus")
    run = described(in_folder, contract=CONTRACT, part_of="grid")
    one = Tracking(["prometheus"], run, in_folder / "tracking", timeout=LONG)
    one.log(3, {K3: 3e-5, "optim/first_offender": "model.w", "task/own score": 1.0})
    one.alarm(ALARM)
    text = scraped(one, lambda found: "betterhalf_watchdog_alarms_total{" in found)
    one.finish("finished", {})
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    k3 = families["betterhalf_mismatch_k3_mean"]
    (sample,) = k3.samples
    assert (sample.value, sample.labels) == (3e-5, {"run": "demo", "group": "grid"})
    assert (k3.type, k3.documentation.endswith("Unit: nats.")) == ("gauge", True)
    assert families["betterhalf_step"].samples[0].value == 3
    assert families["betterhalf_task_own_score"].samples[0].value == 1.0
    assert families["betterhalf_watchdog_alarms"].samples[0].value == 1
    with pytest.raises(OSError):
        urllib.request.urlopen(address(one, in_folder), timeout=5)


def address(one: Tracking, folder: Path) -> str:
    notes = [*getattr(one, "seen", []), *one.notes()]
    one.seen = notes  # type: ignore[attr-defined]
    return next((note.removeprefix("prometheus: ") for note in notes if "http" in note), "")


def scraped(one: Tracking, ready: Callable[[str], bool]) -> str:
    import time

    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        place = address(one, Path())
        if place:
            with urllib.request.urlopen(place, timeout=20) as answer:
                text = answer.read().decode()
            if ready(text):
                assert place.startswith("http://127.0.0.1:")
                return str(text)
        time.sleep(0.1)
    raise AssertionError("nothing to scrape")


def test_tensorboard(in_folder: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track_twice("tensorboard", in_folder)
    events = accumulator.EventAccumulator(str(in_folder / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars(K3)] == [
        (step, pytest.approx(step * 1e-5, rel=1e-6)) for step in (1, 2, 3, 4)
    ]

    def text(tag: str) -> str:
        return str(events.Tensors(tag)[-1].tensor_proto.string_val[0].decode())

    assert '"compute"' in text("contract")
    assert '"seed": 0' in text("config")
    assert text("watchdog") == "**warn** step 2: too high"
    assert len(events.Tensors("watchdog")) == 1
    assert '"mismatch_k3": 2e-05' in text("summary")
    assert text("optim/first_offender") == "model.w"
    assert "_hparams_/session_start_info" in events.summary_metadata
