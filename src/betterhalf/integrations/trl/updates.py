"""`optim/*` of one rollout batch of TRL, from its optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.metrics.metric import MetricValue
from betterhalf.reduction import REDUCTIONS

if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimizer step."""

    loss_scale: float
    """Loss scale after the step; 1 if TRL scales no loss."""
    skipped: bool
    """True if a gradient was not finite and the step was left out. Without a loss scale, accelerate skips none."""
    grad_norm: float
    """Global norm of the unscaled gradient before clipping."""
    learning_rate: float
    """Learning rate of the step."""
    first_offender: str | None
    """First parameter of this process with a gradient that is not finite, if the step was skipped."""


def loss_scale(trainer: GRPOTrainer) -> float:
    """Return the loss scale; 1 if TRL scales no loss."""
    scaler = trainer.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def read_update(trainer: GRPOTrainer, scale_before: float, grad_norm: float, learning_rate: float) -> Update:
    """Return the optimizer step that has just been taken or skipped; its gradients are still there.

    A skipped step is known by its loss scale, which falls. accelerate's `optimizer_step_was_skipped` stays false with
    fused optimizers, TRL's default: GradScaler calls them in any case, and they skip the step inside.

    Args:
        trainer: its model and loss scale.
        scale_before: loss scale before the step.
        grad_norm: global norm of the unscaled gradient before clipping.
        learning_rate: that of the step.
    """
    scale = loss_scale(trainer)
    skipped = scale < scale_before
    return Update(
        loss_scale=scale,
        skipped=skipped,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        first_offender=_first_offender(trainer.model.named_parameters()) if skipped else None,
    )


def update_metrics(updates: Sequence[Update], policy_version: int) -> dict[str, MetricValue]:
    """Return `optim/*` and the policy version after these optimizer steps; empty without any."""
    if not updates:
        return {}
    applied = [update.grad_norm for update in updates if not update.skipped and math.isfinite(update.grad_norm)]
    columns: Mapping[str, list[float]] = {
        "optim/loss_scale": [update.loss_scale for update in updates],
        "optim/skipped": [float(update.skipped) for update in updates],
        "optim/updates_applied": [float(not update.skipped) for update in updates],
        "optim/grad_norm": applied,
        "optim/learning_rate": [update.learning_rate for update in updates],
    }
    return {
        **{name: REDUCTIONS[CATALOGUE[name].reduction](column) if column else None for name, column in columns.items()},
        "optim/first_offender": next((update.first_offender for update in updates if update.first_offender), None),
        "policy/version": float(policy_version),
    }


def _first_offender(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Return the name of the first parameter whose gradient is not finite."""
    return next((name for name, parameter in parameters if _is_bad(parameter.grad)), None)


def _is_bad(gradient: Any) -> bool:
    return gradient is not None and not bool(gradient.isfinite().all())
