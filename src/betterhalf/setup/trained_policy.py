"""The policy that a run has trained, from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from betterhalf.errors import CheckpointError
from betterhalf.run_dir import RunDir
from betterhalf.training import checkpoint


def newest_checkpoint(run_path: str) -> tuple[Path, checkpoint.Checkpoint]:
    """Path and content of a run's newest checkpoint.

    Raises:
        CheckpointError: there is none, or it is corrupted.
    """
    path = require_checkpoint(run_path)
    return path, checkpoint.load(path)


def require_checkpoint(run_path: str) -> Path:
    """Path of a run's newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    path = checkpoint.latest(RunDir.open(run_path).checkpoints)
    if path is None:
        raise CheckpointError(
            f"run {run_path} has no checkpoint yet; let it reach one (training.checkpoint_every), or name a model"
        )
    return path
