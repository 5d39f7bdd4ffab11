"""The policy that a run has trained: the weights of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betterhalf.config.load import load_config
from betterhalf.config.schema import RunConfig
from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import CheckpointError, InputError
from betterhalf.models.adapters import trained_parameters
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.training import checkpoint
from betterhalf.training.shards import read_rows
from betterhalf.training.weights.store import require_parameters
from betterhalf.types import BestName

LATEST = "latest"
"""Name of the newest checkpoint of a run."""

BEST = "best"
"""Name of the checkpoint of the best evaluation during training, or of the best `training.keep_best_metric`."""


_BEST: dict[BestName, Callable[..., int | None]] = {"highest": max, "lowest": min}
"""`training.keep_best_mode` -> function that chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestEvaluation:
    """Best evaluation of a run among the steps that have a checkpoint."""

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
    path: Path
    """Folder of the checkpoint, whose files have been verified."""
    base_digest: str
    """Checksum of the base that adapters were trained on; empty without adapters."""
    source: str
    """Name of the checkpoint, for messages."""

    @torch.no_grad()
    def copy_into(self, module: Any) -> None:
        """Replace the trained parameters of a transformers module, each cast to the dtype it has there.

        The module of a run with `lora.rank` has its adapters (`models.adapters.add_adapters`), and keeps its base.

        Raises:
            CheckpointError: the module is another model.
        """
        parameters, weights = dict(trained_parameters(module)), read_rows(self.path, "model", {})
        require_parameters(parameters.items(), weights, self.source)
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])

    def rows(self, wanted: Mapping[str, ShardRange]) -> Iterator[tuple[str, Tensor]]:
        """See `RowSource.rows`: FP32 masters.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        found = read_rows(self.path, "model", wanted)
        shapes = {name: torch.empty(rows.count, *rows.shape[1:], device="meta") for name, rows in wanted.items()}
        require_parameters(shapes.items(), found, self.source)
        yield from found.items()


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
        policy_version=saved.written.policy_version,
        base_digest=saved.written.base_digest,
        path=path,
        source=saved.source,
    )


def require_checkpoint(run_path: str, which: str = LATEST) -> Path:
    """Return the path of a run's checkpoint.

    Args:
        run_path: folder of the run.
        which: `latest`, `best` (of `training.keep_best_metric` if it is set, else of the evaluations), or a step.

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
    config = load_config(run.config)
    if config.training.keep_best_metric is not None:
        return best_by_metric(run, config)
    best = best_evaluation(run)
    if best is None:
        raise InputError(
            f"run {run.path} has no checkpoint of an evaluated step; evaluate during training (evaluate.every), or "
            f"choose {LATEST} or one of the steps {', '.join(map(str, found))}"
        )
    return best.step


def best_steps(run: RunDir, config: RunConfig, *unsaved: int) -> set[int]:
    """Return the steps whose checkpoints are kept in any case: best evaluation, and best value of a metric.

    Args:
        run: folder of the run.
        config: its configuration.
        unsaved: steps that count as well, because their checkpoint is about to be written.
    """
    best = best_evaluation(run, *unsaved) if config.evaluate.keep_best else None
    return {step for step in (best.step if best else None, best_by_metric(run, config, *unsaved)) if step is not None}


def best_by_metric(run: RunDir, config: RunConfig, *unsaved: int) -> int | None:
    """Return the step with the best value of `training.keep_best_metric` among those with a checkpoint.

    The first of equals is the best. None without the setting, or if no step has a value.
    """
    metric, choose = config.training.keep_best_metric, _BEST[config.training.keep_best_mode]
    if metric is None:
        return None
    kept = {*checkpoint.steps(run.checkpoints), *unsaved}
    values = {row["step"]: row.get(metric) for row in read_jsonl(run.metrics) if row["step"] in kept}
    found = {step: value for step, value in values.items() if value is not None}
    return choose(found, key=lambda step: found[step], default=None)


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
