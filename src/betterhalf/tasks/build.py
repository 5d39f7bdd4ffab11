"""Build a task from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from betterhalf.config.schema import PerfectibleTask, ReasoningGymTask, TaskConfig
from betterhalf.tasks.arithmetic import build_arithmetic
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.environment import build_environment
from betterhalf.tasks.held_out import take_part
from betterhalf.tasks.math import build_math
from betterhalf.tasks.perfectible_task import restrict
from betterhalf.tasks.python import build_python
from betterhalf.tasks.reasoning_gym import build_reasoning_gym
from betterhalf.tasks.task import Tokenizer


def build_task(config: TaskConfig, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task that a configuration describes; close it after use.

    Raises:
        InputError: the data cannot be read, is empty, or does not fit the tokenizer.
        MissingExtraError: the task needs an optional package that is not installed.
    """
    task = _BUILDERS[config.type](config, tokenizer)
    return task if isinstance(config, PerfectibleTask | ReasoningGymTask) else take_part(task, config)


def _build_perfectible(config: PerfectibleTask, tokenizer: Tokenizer) -> DatasetTask:
    return restrict(config, build_task(config.base, tokenizer))


_BUILDERS: dict[str, Callable[[Any, Tokenizer], DatasetTask]] = {
    "arithmetic": build_arithmetic,
    "environment": build_environment,
    "math": build_math,
    "reasoning_gym": build_reasoning_gym,
    "perfectible": _build_perfectible,
    "python": build_python,
}
