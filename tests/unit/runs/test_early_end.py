"""An arm or a cell that ends early: what its precision caused is a result, anything else has to run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import (
    EngineDiedError,
    EngineError,
    EngineNumericsError,
    LossScaleError,
    NumericsError,
    RunError,
)
from betterhalf.run_dir import RunDir, read_json
from betterhalf.runs import sanity, sweep_cell


def train_raises(monkeypatch: pytest.MonkeyPatch, error: RunError) -> None:
    def run_training(*_: Any, **__: Any) -> dict[str, Any]:
        raise error

    for module in (sanity, sweep_cell):
        monkeypatch.setattr(module, "run_training", run_training)


@pytest.mark.parametrize("kind", [EngineDiedError, EngineError])
def test_an_engine_that_was_killed_or_does_not_start_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[RunError]
) -> None:
    train_raises(monkeypatch, kind("killed by SIGKILL"))
    arm, cell = RunDir(tmp_path / "arm"), RunDir(tmp_path / "cell")
    with pytest.raises(kind, match="SIGKILL"):
        sanity.run_arm(RunConfig(), "fp16", arm)
    with pytest.raises(kind, match="SIGKILL"):
        sweep_cell.run_cell(RunConfig(), "precision=fp16", cell)
    # Without a summary, --resume continues both.
    assert not arm.summary.exists()
    assert not sweep_cell.finished(RunConfig(), cell)


@pytest.mark.parametrize("kind", [EngineNumericsError, NumericsError, LossScaleError])
def test_an_end_that_the_precision_caused_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[RunError]
) -> None:
    train_raises(monkeypatch, kind("not finite in fp16"))
    arm, cell = RunDir(tmp_path / "arm"), RunDir(tmp_path / "cell")
    assert sanity.run_arm(RunConfig(), "fp16", arm)["passed"] is False
    sweep_cell.run_cell(RunConfig(), "precision=fp16", cell)
    assert read_json(arm.summary)["reason"] == "not finite in fp16"
    assert read_json(cell.summary)["reason"] == "not finite in fp16"
    assert sweep_cell.finished(RunConfig(), cell)
