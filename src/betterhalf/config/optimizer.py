"""The section `[optimizer]`: AdamW and the learning rate."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.types import SchedulerName


class OptimizerConfig(Section):
    """AdamW on FP32 master weights."""

    learning_rate: float = Field(1e-6, ge=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the denominator. The states are FP32, where 1e-8 is not 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Upper bound of the global gradient norm: gradients are clipped to it after unscaling."""
    scheduler: SchedulerName = "constant"
    """Learning rate after the warm-up: `linear` and `cosine` decay to `min_ratio` at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Number of steps of linear warm-up."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate, as a share of the peak."""
