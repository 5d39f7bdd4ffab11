"""Rows written by any number of ranks are read by any number, bit for bit, and damage to a file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.written_checkpoints import load, part_of, ranges_of, save

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import CheckpointError
from betterhalf.training import shards
from betterhalf.training.shards import read_rows, write_manifest, write_shards
from betterhalf.training.trainer import TrainerState


def state() -> TrainerState:
    """Make a state whose tensors have 1 to 7 rows, so that some ranks hold none."""
    draws = torch.Generator().manual_seed(0)
    model = {
        name: torch.randn(shape, generator=draws)
        for name, shape in {"wide": (7, 3), "norm": (5,), "two": (2, 2), "one": (1, 4)}.items()
    }
    optimizer = {f"{key}/{name}": torch.randn_like(model[name]) for key in ("exp_avg", "exp_avg_sq") for name in model}
    optimizer |= {f"step/{name}": torch.tensor(3.0) for name in model}
    return TrainerState(
        model=model,
        optimizer=optimizer,
        loss_scaler={"scale": 8.0},
        policy_version=3,
        reference={name: tensor.half() for name, tensor in model.items()},
        reference_digest="abc",
    )


def assert_equal(found: TrainerState, expected: TrainerState) -> None:
    for kind in ("model", "optimizer", "reference"):
        one, other = getattr(found, kind), getattr(expected, kind)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
            assert torch.equal(one[name], other[name])
    assert (found.loss_scaler, found.policy_version, found.reference_digest) == ({"scale": 8.0}, 3, "abc")


@pytest.mark.parametrize("reading", [1, 2, 3])
@pytest.mark.parametrize("writing", [1, 2, 3])
def test_any_number_of_ranks_reads_what_any_number_wrote(writing: int, reading: int, tmp_path: Path) -> None:
    whole = state()
    path = save(tmp_path, 1, whole, ranks=writing)
    for rank in range(reading):
        found = load(path, whole.model, rank, reading)
        assert_equal(found, part_of(whole, rank, reading)[0])
    assert_equal(load(path), whole)


def test_a_step_count_is_written_by_every_rank_and_rows_by_one(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(), ranks=3)
    held = [load_file(path / f"optimizer.{rank}-of-3.safetensors") for rank in range(3)]
    assert [one["step/wide"].item() for one in held] == [3.0, 3.0, 3.0]
    # 7 rows in chunks of 3.
    assert [len(one["exp_avg/wide"]) for one in held] == [3, 3, 1]
    assert [len(one["exp_avg/two"]) for one in held] == [1, 1, 0]


@pytest.mark.parametrize(
    "tensors",
    [
        {
            "a": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
            "b": torch.tensor(2.5),
            "c": torch.ones(3, dtype=torch.float16),
            "e": torch.zeros(0, 4),
            "f": torch.tensor([7], dtype=torch.int64),
        },
        {"d": torch.ones(5, dtype=torch.bfloat16)},
        {},
    ],
)
def test_a_file_of_whole_tensors_is_what_the_safetensors_package_writes(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = write_shards(tmp_path, "model", tensors, {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / file.name).read_bytes() == (tmp_path / "theirs").read_bytes()
    assert file.name == "model.safetensors" and file.num_bytes == (tmp_path / "theirs").stat().st_size


def test_pieces_of_any_size_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.arange(100.0)}
    whole = write_shards(tmp_path, "model", tensors, {})
    monkeypatch.setattr(shards, "_CHUNK", 7)
    (tmp_path / "again").mkdir()
    assert write_shards(tmp_path / "again", "model", tensors, {}) == whole


FILES = ("model.0-of-2.safetensors", "optimizer.1-of-2.safetensors", "reference.1-of-2.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "empty"])
def test_damage_to_a_file_is_named_before_anything_is_read(name: str, damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1, state(), ranks=2)
    path = save(tmp_path, 2, state(), ranks=2) / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        altered = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"truncated": content[:-1], "altered": altered, "empty": b""}[damage])
    words = {
        "truncated": f"{name} has {len(content) - 1} bytes instead of {len(content)}",
        "altered": f"{name} has another checksum",
        "missing": f"{name}: No such file or directory",
        "empty": f"{name} has 0 bytes",
    }
    with pytest.raises(CheckpointError, match=rf"step-000002 is corrupted \({words[damage]}.*resume from step-000001"):
        load(path.parent)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "manifest.json cannot be read"),
        ("{", "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read"),
        ('{"model.safetensors": 3}', "manifest.json cannot be read"),
        ('{"../model.safetensors": {"bytes": 1, "sha256": ""}}', "names ../model.safetensors"),
        ("{}", "model is not in the manifest; optimizer is not in the manifest; state.json is not in the manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(manifest: str | None, message: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1, state())
    (path / "manifest.json").unlink()
    if manifest is not None:
        (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=f"{message}.*delete that folder to start the run again"):
        load(path)


@pytest.mark.parametrize("name", ["model.1-of-2.safetensors", "reference.0-of-2.safetensors"])
def test_a_manifest_without_the_file_of_one_rank_is_refused(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(), ranks=2) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        load(path.parent)


@pytest.mark.parametrize("first", [2, 4, 5])
def test_rows_that_are_missing_or_doubled_are_refused(first: int, tmp_path: Path) -> None:
    """Rank 0 has rows 0 to 2 of 6, so rank 1 must begin at 3."""
    rows = [ShardRange(first=0, count=3, shape=(6, 2)), ShardRange(first=first, count=3, shape=(6, 2))]
    files = tuple(
        write_shards(tmp_path, "model", {"w": torch.zeros(3, 2)}, {"w": held}, rank=rank, world_size=2)
        for rank, held in enumerate(rows)
    )
    write_manifest(tmp_path, files)
    with pytest.raises(CheckpointError, match="do not hold every row of w once"):
        read_rows(tmp_path, "model", {})


def test_another_shape_is_another_model(tmp_path: Path) -> None:
    whole = state()
    path = save(tmp_path, 1, whole, ranks=2)
    other = {**whole.model, "wide": torch.zeros(8, 3)}
    with pytest.raises(CheckpointError, match="another shape of parameter 'wide': it was made by another model"):
        load(path, other, 0, 2)


def test_rows_that_are_not_those_of_the_tensor_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="w: "):
        write_shards(tmp_path, "model", {"w": torch.zeros(3)}, ranges_of({"w": torch.zeros(8)}, 0, 2))
