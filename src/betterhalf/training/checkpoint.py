"""Checkpoints that are complete or absent: safetensors and JSON, with a digest of each file.

    checkpoints/step-000012/
        model.safetensors       FP32 masters by Hugging Face name
        optimizer.safetensors   AdamW states, `<state>/<name>`
        reference.safetensors   reference policy in the compute dtype, if it has been refreshed
        state.json              step, loss scaler, policy version, data position, random states
        manifest.json           size and SHA-256 of the others; written last

A checkpoint is written under a temporary name and then renamed, so a folder named `step-...` is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from betterhalf.errors import CheckpointError, RunError
from betterhalf.run_dir import disk_full
from betterhalf.training.trainer import TrainerState

_TENSOR_FILES = ("model", "optimizer")
_REFERENCE = "reference"
"""Name of a file that only some checkpoints have."""
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything a run needs to continue as if it had never stopped."""

    step: int
    """Last finished step; 0 before the first."""
    trainer: TrainerState
    """Weights, optimizer, loss scaler, policy version and reference policy."""
    values: dict[str, Any]
    """JSON values of the run: data position, watchdog, digests of the data."""


def save(folder: Path, checkpoint: Checkpoint, *, keep: int, best: int | None = None) -> Path:
    """Write a checkpoint, then delete all but the newest `keep` and that of the step `best`.

    Raises:
        RunError: the checkpoint cannot be written, for example on a full disk; earlier checkpoints are untouched.
    """
    final = step_folder(folder, checkpoint.step)
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_files(partial, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except Exception as error:  # safetensors raises its own class for errors of the disk
        shutil.rmtree(partial, ignore_errors=True)
        fix = "free disk space" if disk_full(error) else "check permissions, quota and file size limit of its folder"
        raise RunError(f"checkpoint {final} cannot be written ({error}); {fix}, then continue with --resume") from error
    for old in _complete(folder)[:-keep]:
        if best is None or old != step_folder(folder, best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step`, which need not exist."""
    return folder / f"step-{step:06d}"


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending."""
    return [int(path.name.removeprefix("step-")) for path in _complete(folder)]


def _write_files(partial: Path, checkpoint: Checkpoint) -> None:
    trainer = checkpoint.trainer
    kept = {"model": trainer.model, "optimizer": trainer.optimizer}
    if trainer.reference:
        kept[_REFERENCE] = trainer.reference
    for name, held in kept.items():
        tensors = {key: tensor.contiguous().cpu() for key, tensor in held.items()}
        save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
    scalars = {
        "loss_scaler": trainer.loss_scaler,
        "policy_version": trainer.policy_version,
        "reference_digest": trainer.reference_digest,
    }
    state = {"step": checkpoint.step, "trainer": scalars, **checkpoint.values}
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for path in partial.iterdir():
        _sync(path)
    manifest = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
    _write_synced(partial / "manifest.json", json.dumps(manifest, indent=1))


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Flush a finished file to the disk, so that a renamed checkpoint is complete even after a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoints by step, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run; None if it has none yet."""
    found = _complete(folder)
    return found[-1] if found else None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, after checking every file against its digest.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message says which folder to delete.
    """
    _verify(path)
    values = json.loads((path / "state.json").read_text())
    scalars = values.pop("trainer")
    reference = path / f"{_REFERENCE}.safetensors"
    trainer = TrainerState(
        model=load_file(path / "model.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        loss_scaler=scalars["loss_scaler"],
        policy_version=int(scalars["policy_version"]),
        reference=load_file(reference) if reference.exists() else {},
        reference_digest=scalars.get("reference_digest", ""),
        source=f"checkpoint {path}",
    )
    return Checkpoint(step=int(values.pop("step")), trainer=trainer, values=values)


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        damaged = [name for name, expected in manifest.items() if _fingerprint(path / name) != expected]
        expected_names = {f"{name}.safetensors" for name in _TENSOR_FILES} | {"state.json"}
        damaged += sorted(expected_names - set(manifest))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is incomplete ({error}); {_fix_for(path)}") from error
    if damaged:
        raise CheckpointError(f"checkpoint {path} is corrupted ({', '.join(damaged)}); {_fix_for(path)}")


def _fix_for(path: Path) -> str:
    older = [other.name for other in _complete(path.parent) if other.name < path.name]
    if older:
        return f"delete that folder to resume from {older[-1]}"
    return "delete that folder to start the run again from step 1"
