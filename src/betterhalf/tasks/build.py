"""Build a task from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from betterhalf.config.schema import PerfectibleTask, TaskConfig
from betterhalf.tasks.arithmetic import build_arithmetic
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.math import build_math
from betterhalf.tasks.perfectible_task import restrict
from betterhalf.tasks.task import Tokenizer


def build_task(config: TaskConfig, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task that a configuration describes; close it after use.

    Raises:
        InputError: the data cannot be read, is empty, or does not fit the tokenizer.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    return _BUILDERS[config.type](config, tokenizer)


def _build_perfectible(config: PerfectibleTask, tokenizer: Tokenizer) -> DatasetTask:
    return restrict(config, build_task(config.base, tokenizer))


_BUILDERS: dict[str, Callable[[Any, Tokenizer], DatasetTask]] = {
    "arithmetic": build_arithmetic,
    "math": build_math,
    "perfectible": _build_perfectible,
}
