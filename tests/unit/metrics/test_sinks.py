"""Metric sinks: the record is exact and always written; other sinks may fail without ending the run."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from betterhalf.errors import InputError, MissingExtraError, RunError
from betterhalf.metrics.sinks import JsonlSink, MetricValue, Sinks, TensorBoardSink
from betterhalf.run_dir import RunDir, read_jsonl

REWARD, K3 = "rollout/reward/mean", "mismatch/k3/mean"


class FakeSink:
    """Sink that remembers its rows, and fails on request."""

    def __init__(self, *, fail: bool = False) -> None:
        self.rows: list[tuple[int, Mapping[str, MetricValue]]] = []
        self.calls = 0
        self.closed = False
        self.fail = fail

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        self.calls += 1
        if self.fail:
            raise ConnectionError("no route")
        self.rows.append((step, metrics))

    def close(self) -> None:
        self.closed = True


def test_jsonl_rows_are_flat_with_step_first_and_nan_as_null(tmp_path: Path) -> None:
    sink = JsonlSink(RunDir(tmp_path).append_metrics)
    sink.write(1, {REWARD: 0.5, K3: math.nan})
    sink.write(2, {REWARD: None})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [f'{{"step": 1, "{REWARD}": 0.5, "{K3}": null}}', f'{{"step": 2, "{REWARD}": null}}']


def test_a_metric_outside_the_catalogue_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sink = JsonlSink(RunDir(tmp_path).append_metrics)
    with pytest.raises(InputError, match=REWARD):
        sink.write(1, {"rollout/reward/meen": 0.5})
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_number_survives_the_file_exactly(tmp_path: Path) -> None:
    value = 2.1000000000000003e-08
    JsonlSink(RunDir(tmp_path).append_metrics).write(1, {K3: value})
    assert read_jsonl(tmp_path / "metrics.jsonl")[0][K3] == value


def test_every_sink_gets_every_row_and_is_closed() -> None:
    record, extra = FakeSink(), FakeSink()
    sinks = Sinks(record, [extra])
    sinks.write(1, {REWARD: 0.5})
    sinks.close()
    assert record.rows == extra.rows == [(1, {REWARD: 0.5})]
    assert record.closed
    assert extra.closed


def test_an_extra_sink_that_fails_warns_once_and_is_dropped() -> None:
    record, broken, warnings = FakeSink(), FakeSink(fail=True), list[str]()
    sinks = Sinks(record, [broken], warn=warnings.append)
    sinks.write(1, {REWARD: 0.5})
    sinks.write(2, {REWARD: 0.6})
    sinks.close()
    assert [step for step, _ in record.rows] == [1, 2]
    assert broken.calls == 1
    assert len(warnings) == 1
    assert "FakeSink" in warnings[0]
    assert "no route" in warnings[0]


def test_a_record_that_fails_ends_the_run(tmp_path: Path) -> None:
    def full(_: Mapping[str, Any]) -> None:
        raise RunError("disk is full")

    extra = FakeSink()
    with pytest.raises(RunError, match="disk is full"):
        Sinks(JsonlSink(full), [extra]).write(1, {REWARD: 0.5})
    assert extra.calls == 0


def test_tensorboard_reads_back_the_scalars_without_text_or_missing_ones(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    sink = TensorBoardSink(tmp_path)
    sink.write(7, {REWARD: 0.5, K3: None, "optim/first_offender": "layers.0.weight"})
    sink.close()
    (path,) = tmp_path.iterdir()
    events = [event for event in loader.LegacyEventFileLoader(str(path)).Load() if event.HasField("summary")]
    assert [(event.step, [(v.tag, v.simple_value) for v in event.summary.value]) for event in events] == [
        (7, [(REWARD, 0.5)])
    ]


def test_tensorboard_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"betterhalf\[tensorboard\]"):
        TensorBoardSink(tmp_path)


def test_rows_are_valid_json_for_any_numbers(tmp_path: Path) -> None:
    sink = JsonlSink(RunDir(tmp_path).append_metrics)
    sink.write(1, {REWARD: math.inf, K3: -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, REWARD: None, K3: None}
