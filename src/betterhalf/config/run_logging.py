"""The section `[logging]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from betterhalf.config.section import Section


class LoggingConfig(Section):
    """What is shown and kept."""

    console: Literal["auto", "live", "lines", "quiet"] = "auto"
    """`live` dashboard on a terminal, plain `lines` elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    rollouts_per_step: int = Field(2, ge=0)
    """Rollouts kept in `rollouts.jsonl` in each step, with per-token columns."""
