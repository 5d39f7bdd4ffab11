"""The policy that a run has trained: the weights of its newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betterhalf.errors import CheckpointError
from betterhalf.run_dir import RunDir
from betterhalf.training import checkpoint
from betterhalf.training.weights.store import require_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPolicy:
    """Weights that a run has trained."""

    step: int
    """Last finished step of the run."""
    policy_version: int
    """Number of applied updates."""
    weights: Mapping[str, Tensor]
    """FP32 masters by unfused Hugging Face name."""
    source: str
    """Name of the checkpoint, for messages."""

    @torch.no_grad()
    def copy_into(self, module: Any) -> None:
        """Replace the parameters of a transformers module, each cast to the dtype it has there.

        Raises:
            CheckpointError: the module is another model.
        """
        parameters = dict(module.named_parameters())
        require_parameters(parameters.items(), self.weights, self.source)
        for name, parameter in parameters.items():
            parameter.copy_(self.weights[name])


def load_policy(run_path: str) -> TrainedPolicy:
    """Load the weights of a run's newest checkpoint.

    Raises:
        CheckpointError: there is none, or it is corrupted.
    """
    path = require_checkpoint(run_path)
    saved = checkpoint.load(path)
    return TrainedPolicy(
        step=saved.step,
        policy_version=saved.trainer.policy_version,
        weights=saved.trainer.model,
        source=saved.trainer.source,
    )


def require_checkpoint(run_path: str) -> Path:
    """Return the path of a run's newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    path = checkpoint.latest(RunDir.open(run_path).checkpoints)
    if path is None:
        raise CheckpointError(f"run {run_path} has no checkpoint yet; let it reach one (training.checkpoint_every)")
    return path
