"""Learning rate as a function of the step, without state to save or restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from betterhalf.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of one step.

    Linear warm-up over `warmup_steps` (above 0 in step 1), then the configured shape down to `min_ratio` of the
    peak at the last step.

    Args:
        config: peak, warm-up and shape.
        step: counts from 1.
        total_steps: steps of the run.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / (config.warmup_steps + 1)
    remaining = max(1, total_steps - config.warmup_steps - 1)
    progress = min(1.0, (step - config.warmup_steps - 1) / remaining)
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * _SHAPES[config.scheduler](progress))


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
