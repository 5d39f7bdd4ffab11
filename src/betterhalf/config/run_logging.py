"""The section `[logging]`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.types import ConsoleMode


class LoggingConfig(Section):
    """What is shown and kept."""

    console: ConsoleMode = "auto"
    """`live` dashboard on a terminal, plain `lines` elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    rollouts_per_step: int = Field(2, ge=0)
    """Rollouts kept in `rollouts.jsonl` in each step, with per-token columns."""
