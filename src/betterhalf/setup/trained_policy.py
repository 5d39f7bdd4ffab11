"""The policy that a run has trained: the weights of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betterhalf.errors import CheckpointError, InputError
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.training import checkpoint
from betterhalf.training.weights.store import require_parameters

LATEST = "latest"
"""Name of the newest checkpoint of a run."""

BEST = "best"
"""Name of the checkpoint of the best evaluation during training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestEvaluation:
    """The best evaluation of a run that has a checkpoint."""

    step: int
    accuracy: float
    """avg@k, the mean over the data sets or that of `evaluate.best_of`."""


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


def load_policy(run_path: str, which: str = LATEST) -> TrainedPolicy:
    """Load the weights of a run's checkpoint; see `require_checkpoint`.

    Raises:
        CheckpointError: there is none, or it is corrupted.
        InputError: `which` names no checkpoint.
    """
    path = require_checkpoint(run_path, which)
    saved = checkpoint.load(path)
    return TrainedPolicy(
        step=saved.step,
        policy_version=saved.trainer.policy_version,
        weights=saved.trainer.model,
        source=saved.trainer.source,
    )


def require_checkpoint(run_path: str, which: str = LATEST) -> Path:
    """Return the path of a run's checkpoint.

    Args:
        run_path: folder of the run.
        which: `latest`, `best` (that of the best evaluation), or a step.

    Raises:
        CheckpointError: there is none.
        InputError: `which` names no checkpoint.
    """
    run = RunDir.open(run_path)
    found = checkpoint.steps(run.checkpoints)
    if not found:
        raise CheckpointError(f"run {run_path} has no checkpoint yet; let it reach one (training.checkpoint_every)")
    step = _step(run, which, found)
    if step not in found:
        raise InputError(
            f"run {run_path} has no checkpoint {which!r}; choose {LATEST}, {BEST}, or one of the steps "
            f"{', '.join(map(str, found))}"
        )
    return checkpoint.step_folder(run.checkpoints, step)


def _step(run: RunDir, which: str, found: list[int]) -> int | None:
    if which == LATEST:
        return found[-1]
    if which != BEST:
        return int(which) if which.isdecimal() else None
    best = best_evaluation(run)
    if best is None:
        raise InputError(
            f"run {run.path} has no checkpoint of an evaluated step; evaluate during training (evaluate.every), or "
            f"choose {LATEST} or one of the steps {', '.join(map(str, found))}"
        )
    return best.step


def best_evaluation(run: RunDir, *unsaved: int) -> BestEvaluation | None:
    """Return the best evaluation of a run among the steps with a checkpoint, the first of equals; None without one.

    Args:
        run: folder of the run.
        unsaved: steps that count as well, because their checkpoint is about to be written.
    """
    kept = {*checkpoint.steps(run.checkpoints), *unsaved}
    rows = [row for row in read_jsonl(run.evaluated_steps) if row["step"] in kept]
    best = max(rows, key=lambda row: row["accuracy"], default=None)
    return None if best is None else BestEvaluation(step=best["step"], accuracy=best["accuracy"])
