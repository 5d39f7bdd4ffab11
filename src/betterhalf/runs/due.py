"""Steps after which a run evaluates or writes a checkpoint; functions of the configuration alone."""

from __future__ import annotations

from betterhalf.config.schema import RunConfig


def evaluation_due(config: RunConfig, step: int) -> bool:
    """Return whether the policy is evaluated after `step`, or before the first step for 0."""
    every = config.evaluate.every
    return every > 0 and (step % every == 0 or step == config.training.steps)


def checkpoint_due(config: RunConfig, step: int) -> bool:
    """Return whether a checkpoint is written after `step`, independently of evaluations."""
    every = config.training.checkpoint_every
    return step == config.training.steps or (every > 0 and step % every == 0)


def checkpoint_possible(config: RunConfig, step: int) -> bool:
    """Return whether a checkpoint may follow `step`: one is due, or an evaluation may find the best policy."""
    return checkpoint_due(config, step) or (config.evaluate.keep_best and evaluation_due(config, step))
