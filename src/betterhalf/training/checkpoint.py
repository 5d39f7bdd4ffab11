"""Checkpoints that are complete or absent: safetensors and JSON, with a digest of each file.

    checkpoints/step-000012/
        model.safetensors       FP32 masters by parameter name: of all weights, or of LoRA adapters
        optimizer.safetensors   AdamW states, `<state>/<name>`
        reference.safetensors   reference policy in the compute dtype, if it has been refreshed
        state.json              step, loss scaler, policy version, digests, and values of the run such as data position
        manifest.json           size and SHA-256 of the others; written last

Several ranks write files of their rows (see `shards`). A checkpoint is written under a temporary name and then renamed,
so a folder named `step-...` is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from betterhalf.errors import CheckpointError
from betterhalf.training.shards import (
    ShardFile,
    partial_folder,
    verify_files,
    write_file,
    write_manifest,
    writing,
)
from betterhalf.training.state_files import KINDS
from betterhalf.training.trainer import WrittenState

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_HIDDEN = re.compile(r"\.(step-\d{6,})\.(partial|replaced|deleted)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on the disk; its tensors are read from its files."""

    path: Path
    step: int
    """Last finished step; 0 before the first."""
    written: WrittenState
    """Loss scaler, policy version and digests of the reference policy and of the adapters' base."""
    values: dict[str, Any]
    """JSON values of the run: data position, watchdog, digests of the data."""

    @property
    def source(self) -> str:
        """Name for messages."""
        return f"checkpoint {self.path}"


def begin(folder: Path, step: int) -> Path:
    """Create and return an empty folder for the files of the checkpoint after `step`.

    It also removes leftovers of a killed process: call it only while no other checkpoint is being written.

    Raises:
        RunError: it cannot be created, for example on a full disk.
    """
    partial = partial_folder(step_folder(folder, step))
    tidy(folder)
    with writing(partial):
        partial.mkdir(parents=True)
    return partial


def finish(
    partial: Path, files: tuple[ShardFile, ...], checkpoint: Checkpoint, *, keep: int, best: Collection[int]
) -> None:
    """Complete a checkpoint, then delete all but the newest `keep` and those of the steps `best`.

    Args:
        partial: the folder that `begin` returned.
        files: its files, on the disk.
        checkpoint: everything else, and the final path.
        keep: number of checkpoints to keep.
        best: steps whose checkpoints are kept as well.

    Raises:
        RunError: it cannot be written, for example on a full disk; earlier checkpoints are untouched.
    """
    state = {"step": checkpoint.step, "trainer": asdict(checkpoint.written), **checkpoint.values}
    final = checkpoint.path
    with writing(partial):
        last = write_file(partial / _STATE, iter([memoryview(json.dumps(state, indent=1).encode())]))
        write_manifest(partial, (*files, last))
        _sync(partial)
        _put_in_place(partial, final)
        _sync(final.parent)
    best_folders = [step_folder(final.parent, step) for step in best]
    for old in _complete(final.parent)[:-keep]:
        if old not in best_folders:
            _delete(old)


def _put_in_place(partial: Path, final: Path) -> None:
    """Give the folder its name. A checkpoint that has it already is set aside, so that one of the two always exists."""
    if not final.exists():
        os.rename(partial, final)
        return
    aside = final.with_name(f".{final.name}.replaced")
    os.rename(final, aside)
    try:
        os.rename(partial, final)
    except OSError:
        os.rename(aside, final)
        raise
    _delete(aside)


def _delete(path: Path) -> None:
    """Delete a checkpoint, if possible. It is renamed first, so that no part of it is ever taken for a checkpoint."""
    deleted = path.with_name(f".{path.name.strip('.').removesuffix('.replaced')}.deleted")
    with contextlib.suppress(OSError):
        shutil.rmtree(deleted, ignore_errors=True)  # left by an earlier attempt
        os.rename(path, deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that a renamed checkpoint is complete even after a power loss."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tidy(folder: Path) -> None:
    """Clean up after a process that was killed; call it only while no checkpoint is being written."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            # Killed between the two renames of `_put_in_place`.
            os.rename(path, folder / match[1])
        else:
            shutil.rmtree(path, ignore_errors=True)


def discard(partial: Path) -> None:
    """Remove the files of a checkpoint that was not finished."""
    shutil.rmtree(partial, ignore_errors=True)


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step`, which need not exist."""
    return folder / f"step-{step:06d}"


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending."""
    return [int(path.name.removeprefix("step-")) for path in _complete(folder)]


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoints by step, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run; None if it has none yet."""
    found = _complete(folder)
    return found[-1] if found else None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint without its tensors, after checking every file against its checksum.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message says which folder to delete.
    """
    try:
        verify_files(path, frozenset({*KINDS, _STATE}))
        values = json.loads((path / _STATE).read_text())
        scalars = values.pop("trainer")
        written = WrittenState(
            loss_scaler=scalars["loss_scaler"],
            policy_version=int(scalars["policy_version"]),
            reference_digest=scalars.get("reference_digest", ""),
            base_digest=scalars.get("base_digest", ""),
        )
        return Checkpoint(path=path, step=int(values.pop("step")), written=written, values=values)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_fix_for(path)}") from error


def _fix_for(path: Path) -> str:
    found = _complete(path.parent)
    older = found[: found.index(path)] if path in found else []
    if older:
        return f"delete that folder to resume from {older[-1].name}"
    return "delete that folder to start the run again from step 1"
