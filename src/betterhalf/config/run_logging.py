"""The section `[logging]`: terminal output and extra records.

The file is not called `logging.py`, so that nothing mistakes it for the standard library's module.
"""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.types import ConsoleMode


class LoggingConfig(Section):
    """Terminal output and extra records."""

    console: ConsoleMode = "auto"
    """Progress on the terminal: a `live` dashboard, plain `lines`, or none (`quiet`). `auto`: `live` on a terminal,
    `lines` elsewhere."""
    tensorboard: bool = False
    """Write TensorBoard events as well (needs the extra `tensorboard`)."""
    rollouts_per_step: int = Field(2, ge=0)
    """Number of rollouts that each step keeps in `rollouts.jsonl`, with per-token columns."""
