"""A checkpoint is restored bit for bit, or an error names the damage and how to continue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from betterhalf.errors import CheckpointError, RunError
from betterhalf.training import checkpoint
from betterhalf.training.checkpoint import Checkpoint
from betterhalf.training.trainer import TrainerState
from betterhalf.training.weights.store import require_parameters


def sample(step: int) -> Checkpoint:
    trainer = TrainerState(
        model={"w": torch.arange(4.0) * step},
        optimizer={"step/w": torch.tensor(float(step))},
        loss_scaler={"scale": 8.0},
        policy_version=2 * step,
    )
    return Checkpoint(step=step, trainer=trainer, values={"position": 32 * step})


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, sample(3), keep=2)
    back = checkpoint.load(path)
    assert back.step == 3
    assert back.values == {"position": 96}
    assert torch.equal(back.trainer.model["w"], torch.arange(4.0) * 3)
    assert back.trainer.optimizer["step/w"].item() == 3.0
    assert back.trainer.loss_scaler == {"scale": 8.0} and back.trainer.policy_version == 6
    assert back.trainer.source == f"checkpoint {path}"


def test_only_the_newest_are_kept_and_latest_is_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, sample(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000100"
    assert checkpoint.latest(tmp_path / "absent") is None


def test_the_best_is_kept_besides_the_newest_until_another_is_better(tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 2), (6, 2), (8, 8), (10, 8)):
        checkpoint.save(tmp_path, sample(step), keep=1, best=best)
        assert checkpoint.steps(tmp_path) == sorted({step, best})
    checkpoint.save(tmp_path, sample(12), keep=1)
    assert checkpoint.steps(tmp_path) == [12]
    assert checkpoint.step_folder(tmp_path, 12) == checkpoint.latest(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_byte_is_found_and_the_older_checkpoint_named(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, sample(1), keep=2)
    path = checkpoint.save(tmp_path, sample(2), keep=2)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}.*resume from step-000001"):
        checkpoint.load(path)


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, sample(2), keep=2)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="incomplete.*start the run again"):
        checkpoint.load(path)


def test_a_manifest_that_lists_too_little_is_not_trusted(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, sample(2), keep=2)
    (path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="corrupted"):
        checkpoint.load(path)


def test_a_full_disk_leaves_older_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, sample(1), keep=2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left.*--resume"):
        checkpoint.save(tmp_path, sample(2), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ({"a": 1, "b": 1}, {"a": 1}, "lacks parameter 'b'"),
        ({"a": 1}, {"a": 1, "c": 1}, "unknown parameter 'c'"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "another shape of parameter 'b'.*name the model"),
    ],
)
def test_another_model_s_checkpoint_is_refused(expected: dict[str, int], found: dict[str, int], message: str) -> None:
    tensors = [{name: torch.zeros(size) for name, size in sizes.items()} for sizes in (expected, found)]
    with pytest.raises(CheckpointError, match=message):
        require_parameters(tensors[0].items(), tensors[1], "checkpoint x")
