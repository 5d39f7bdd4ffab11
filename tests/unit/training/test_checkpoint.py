"""A checkpoint is whole or absent, whatever ends the process or fills the disk, and is restored bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.written_checkpoints import load, save

from betterhalf.errors import CheckpointError, RunError
from betterhalf.training import checkpoint
from betterhalf.training.state_files import StateFiles
from betterhalf.training.trainer import TrainerState
from betterhalf.training.weights.store import require_parameters


def state(step: int) -> TrainerState:
    return TrainerState(
        model={"w": torch.arange(4.0) * step},
        optimizer={"exp_avg/w": torch.ones(4) * step, "step/w": torch.tensor(float(step))},
        loss_scaler={"scale": 8.0},
        policy_version=2 * step,
    )


def save_step(folder: Path, step: int, **options: Any) -> Path:
    return save(folder, step, state(step), {"position": 32 * step}, **options)


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint loads and has the numbers of its step."""
    step, found = int(path.name.removeprefix("step-")), load(path)
    return torch.equal(found.model["w"], torch.arange(4.0) * step) and found.policy_version == 2 * step


def test_round_trip(tmp_path: Path) -> None:
    path = save_step(tmp_path, 3)
    back, found = checkpoint.load(path), load(path)
    assert back.step == 3
    assert back.values == {"position": 96}
    assert torch.equal(found.model["w"], torch.arange(4.0) * 3)
    assert found.optimizer["step/w"].item() == 3.0
    assert found.loss_scaler == {"scale": 8.0} and found.policy_version == 6
    assert found.source == f"checkpoint {path}"


def test_what_an_earlier_deletion_left_does_not_keep_a_replaced_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    left = tmp_path / ".step-000003.deleted"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half deleted")
    save_step(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_checkpoint_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Write the files as version 0.1.0 did."""
    path = tmp_path / "step-000002"
    path.mkdir()
    whole = state(2)
    for kind in ("model", "optimizer"):
        save_file(getattr(whole, kind), path / f"{kind}.safetensors", metadata={"format": "pt"})
    trainer = {"loss_scaler": {"scale": 8.0}, "policy_version": 4}
    (path / "state.json").write_text(json.dumps({"step": 2, "trainer": trainer, "position": 64}))
    manifest = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(path.iterdir())
    }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    assert is_whole(path)
    assert checkpoint.load(path).values == {"position": 64}
    # In the present layout the files of one rank are the same.
    again = save_step(tmp_path / "again", 2)
    for kind in ("model", "optimizer"):
        name = f"{kind}.safetensors"
        assert (again / name).read_bytes() == (path / name).read_bytes()


# -- retention


def test_only_the_newest_are_kept_and_latest_is_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100, 1_000_000):
        save_step(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000100", "step-1000000"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000"
    assert checkpoint.latest(tmp_path / "absent") is None


def test_the_best_is_kept_besides_the_newest_until_another_is_better(tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 2), (6, 2), (8, 8), (10, 8)):
        save_step(tmp_path, step, keep=1, best=[best])
        assert checkpoint.steps(tmp_path) == sorted({step, best})
    save_step(tmp_path, 12, keep=1)
    assert checkpoint.steps(tmp_path) == [12]
    assert checkpoint.step_folder(tmp_path, 12) == checkpoint.latest(tmp_path)


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 1, keep=1)
    save(tmp_path, 1, state(1), {"position": 5}, keep=1)
    assert checkpoint.load(tmp_path / "step-000001").values == {"position": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


# -- what ends a process


CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir")
"""System calls by which saving changes the disk; a process may be killed before each."""


def patched(act: Callable[[str], None]) -> dict[str, Any]:
    """Return the functions of `os`, each of which first calls `act`."""

    def wrap(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            act(name)
            return real(*arguments, **options)

        return call

    return {name: wrap(name) for name in CALLS}


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a fork that ends without any clean-up before its system call `number`; False if it finished."""
    child = os.fork()
    if child == 0:
        count = 0

        def act(_: str) -> None:
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)

        try:
            for name, function in patched(act).items():
                setattr(os, name, function)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("ranks", "again"), [(2, False), (1, True)], ids=["new", "replaced"])
def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_never_none(ranks: int, again: bool, tmp_path: Path) -> None:
    number, left = 1, set()
    step = 1 if again else 2
    while True:
        folder = tmp_path / str(number)
        save_step(folder, 1, keep=1)
        killed = killed_at(number, lambda folder=folder: save_step(folder, step, ranks=ranks, keep=1))  # type: ignore[misc]
        checkpoint.tidy(folder)
        found = checkpoint.steps(folder)
        assert found and all(is_whole(checkpoint.step_folder(folder, one)) for one in found)
        left.add(tuple(found))
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{one:06d}" for one in found]
        save_step(folder, step, keep=1)
        assert checkpoint.steps(folder) == [step]
        if not killed:
            break
        number += 1
    assert number > 20
    assert left == ({(1,)} if again else {(1,), (1, 2), (2,)})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_write_that_fails_is_undone_and_earlier_checkpoints_stay(
    ranks: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail at each write, flush, rename and new folder in turn."""
    save_step(tmp_path, 1, keep=1)
    fix = "check permissions" if code == errno.EIO else "free disk space"
    for number in range(1, 100):
        count = 0

        def act(name: str, number: int = number) -> None:
            nonlocal count
            count += name in ("write", "fsync", "rename", "mkdir")
            if count == number and name in ("write", "fsync", "rename", "mkdir"):
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            for name, function in patched(act).items():
                patch.setattr(os, name, function)
            try:
                save_step(tmp_path, 2, ranks=ranks, keep=2)
            except RunError as error:
                words = f"checkpoint {tmp_path}/step-000002 cannot be written"
                assert str(error).startswith(words) and f"{fix}" in str(error) and "--resume" in str(error)
            else:
                break
        assert is_whole(tmp_path / "step-000001")
        # The last flush follows the rename: the checkpoint is whole already.
        assert {path.name for path in tmp_path.iterdir()} <= {"step-000001", "step-000002"}
    assert 10 < number < 99
    assert checkpoint.steps(tmp_path) == [1, 2] and is_whole(tmp_path / "step-000002")


def test_a_write_that_is_cut_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    assert is_whole(save_step(tmp_path, 1))


# -- in the background


def test_the_tensors_are_copied_before_writing_begins(tmp_path: Path) -> None:
    trainer, files = state(1), StateFiles()
    written = files.write(tmp_path, trainer, {})
    trainer.model["w"].zero_()
    trainer.loss_scaler["scale"] = 4.0
    (model, optimizer) = files.wait()
    assert (model.name, optimizer.name) == ("model.safetensors", "optimizer.safetensors")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.arange(4.0))
    assert written.loss_scaler == {"scale": 8.0}


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_writing_gives_way_to_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, fsync = [], os.fsync

    def noted(fd: int) -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    files = StateFiles()
    files.write(tmp_path, state(1), {})
    files.wait()
    assert found == [19, 19]
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19


def test_a_failure_in_the_background_is_raised_by_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StateFiles()
    files.write(tmp_path / "absent", state(1), {})
    with pytest.raises(RunError, match="absent cannot be written"):
        files.write(tmp_path, state(1), {})
    files.write(tmp_path, state(1), {})
    assert len(files.wait()) == 2


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
