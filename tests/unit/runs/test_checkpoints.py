"""Checkpoints are written behind the steps; failures are raised, and the best ones are kept."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from betterhalf.config.schema import RunConfig
from betterhalf.errors import BetterhalfError, ConfigError, InputError, RunError, TrainerDiedError
from betterhalf.run_dir import RunDir, write_json_atomic
from betterhalf.runs.checkpoints import Checkpoints, require_known_metric
from betterhalf.runs.progress import Progress
from betterhalf.setup.trained_policy import require_checkpoint
from betterhalf.training import checkpoint
from betterhalf.training.shards import ShardFile
from betterhalf.training.state_files import StateFiles
from betterhalf.training.trainer import TrainerState, WrittenState

LIMIT = 10.0
"""Seconds after which a test that hangs fails."""


class SlowTrainer:
    """Trainer of one weight, whose files are complete once the test says so, or fail."""

    def __init__(self) -> None:
        self.files = StateFiles()
        self.go_on = threading.Event()
        self.failure: BetterhalfError | None = None
        self.weight = torch.zeros(2)

    def write_state(self, folder: Path) -> WrittenState:
        state = TrainerState(model={"w": self.weight}, optimizer={}, loss_scaler={"scale": 2.0}, policy_version=1)
        return self.files.write(folder, state, {})

    def wait_written(self) -> tuple[ShardFile, ...]:
        assert self.go_on.wait(LIMIT)
        files = self.files.wait()
        failure, self.failure = self.failure, None
        if failure:
            raise failure
        return files


class Made:
    """Checkpoints of a run with a slow trainer."""

    def __init__(self, path: Path, **training: Any) -> None:
        self.run, self.trainer = RunDir(path), SlowTrainer()
        config = RunConfig.model_validate({"training": {"keep_checkpoints": 1, **training}})
        record = SimpleNamespace(to_json=lambda: {"rows": 3})
        parts: Any = SimpleNamespace(config=config, trainer=self.trainer, data=record, evaluation=())
        self.checkpoints = Checkpoints(parts, self.run)

    def save(self, step: int) -> None:
        self.checkpoints.save(Progress(step=step, position=10 * step, policy_version=1))

    def steps(self) -> list[int]:
        return checkpoint.steps(self.run.checkpoints)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_a_step_does_not_wait_for_the_files_but_the_next_checkpoint_does(made: Made) -> None:
    made.trainer.weight.fill_(3.0)
    made.save(1)
    made.trainer.weight.fill_(4.0)
    made.checkpoints.check()
    assert made.steps() == []
    threading.Timer(0.05, made.trainer.go_on.set).start()
    made.save(2)
    assert made.steps() == [1] or made.steps() == [2]
    made.checkpoints.wait()
    assert made.steps() == [2]
    assert sorted(path.name for path in made.run.checkpoints.iterdir()) == ["step-000002"]


def test_the_state_is_that_of_the_step(made: Made) -> None:
    from safetensors.torch import load_file

    made.trainer.weight.fill_(3.0)
    made.save(1)
    made.trainer.weight.fill_(4.0)
    made.trainer.go_on.set()
    made.checkpoints.wait()
    path = checkpoint.step_folder(made.run.checkpoints, 1)
    assert torch.equal(load_file(path / "model.safetensors")["w"], torch.full((2,), 3.0))
    found = checkpoint.load(path)
    assert found.values == {"position": 10, "watch": found.values["watch"], "data": {"rows": 3}, "evaluation_data": {}}


@pytest.mark.parametrize("how", ["save", "check", "wait"])
def test_a_failure_is_raised_by_the_next_call_and_leaves_what_was_there(made: Made, how: str) -> None:
    made.trainer.go_on.set()
    made.save(1)
    made.checkpoints.wait()
    made.trainer.failure = RunError("the disk is full")
    made.save(2)
    assert made.checkpoints._writing is not None
    made.checkpoints._writing.exception(LIMIT)
    with pytest.raises(RunError, match="the disk is full"):
        {"save": lambda: made.save(3), "check": made.checkpoints.check, "wait": made.checkpoints.wait}[how]()
    assert [path.name for path in made.run.checkpoints.iterdir()] == ["step-000001"]
    made.checkpoints.check()
    made.save(3)
    made.checkpoints.wait()
    assert made.steps() == [3]


def test_a_checkpoint_of_a_rank_that_has_ended_is_forgotten(made: Made) -> None:
    made.trainer.go_on.set()
    made.trainer.failure = TrainerDiedError("rank 1 ended")
    made.save(1)
    made.checkpoints.drop()
    assert list(made.run.checkpoints.iterdir()) == []
    made.trainer.failure = RunError("the disk is full")
    made.save(1)
    with pytest.raises(RunError, match="the disk is full"):
        made.checkpoints.drop()


def test_a_trainer_that_cannot_begin_leaves_nothing(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(folder: Path) -> WrittenState:
        raise TrainerDiedError("rank 1 ended")

    monkeypatch.setattr(made.trainer, "write_state", died)
    with pytest.raises(TrainerDiedError):
        made.save(1)
    assert list(made.run.checkpoints.iterdir()) == []


# -- the best by a metric

METRIC = "rollout/reward/mean"


@pytest.mark.parametrize(
    ("mode", "values", "kept"),
    [
        ("highest", (0.1, 0.5, 0.5, 0.2), [2, 4]),  # the first of equals
        ("lowest", (0.3, 0.1, 0.5, 0.2), [2, 4]),
        ("highest", (None, 0.1, None, 0.2), [4]),
        ("highest", (None, None, None, None), [4]),
    ],
)
def test_the_checkpoint_with_the_best_metric_is_kept(
    mode: str, values: tuple[float | None, ...], kept: list[int], tmp_path: Path
) -> None:
    made = Made(tmp_path, keep_best_metric=METRIC, keep_best_mode=mode)
    made.trainer.go_on.set()
    for step, value in enumerate(values, start=1):
        made.run.append_metrics({"step": step, METRIC: value})
        made.save(step)
    made.checkpoints.wait()
    assert made.steps() == kept
    training = {"keep_best_metric": METRIC, "keep_best_mode": mode}
    write_json_atomic(made.run.config, {"training": training})
    if any(value is not None for value in values):
        assert require_checkpoint(str(tmp_path), "best").name == f"step-{kept[0]:06d}"
    else:
        with pytest.raises(InputError, match="has no checkpoint 'best'"):
            require_checkpoint(str(tmp_path), "best")


def test_a_metric_that_no_step_has_is_refused() -> None:
    config = RunConfig.model_validate({"training": {"keep_best_metric": "rollout/rewards/mean"}})
    with pytest.raises(ConfigError, match=r"keep_best_metric = 'rollout/rewards/mean' .*mean 'rollout/reward/mean'\?"):
        require_known_metric(config)
    for name in (None, METRIC, "task/solved/mean", "evaluation/fresh/accuracy/mean"):
        require_known_metric(RunConfig.model_validate({"training": {"keep_best_metric": name}}))
