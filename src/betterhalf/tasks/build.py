"""From the configuration to the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from betterhalf.config.schema import TaskConfig
from betterhalf.tasks.arithmetic import build_arithmetic
from betterhalf.tasks.task import Task, Tokenizer

_BUILDERS: dict[str, Callable[[Any, Tokenizer], Task]] = {
    "arithmetic": build_arithmetic,
}


def build_task(config: TaskConfig, tokenizer: Tokenizer) -> Task:
    """The task a configuration describes; close it after use.

    Raises:
        InputError: the data cannot be read, is empty, or does not fit the tokenizer.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    return _BUILDERS[config.type](config, tokenizer)
