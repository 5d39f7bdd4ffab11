"""The section `[probe]`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class ProbeConfig(Section):
    """What `probe` samples and how it states its uncertainty."""

    prompts: int = Field(16, ge=1)
    """Prompts, the first ones of the task."""
    group_size: int = Field(4, ge=1)
    """Completions of each prompt."""
    bootstrap: int = Field(1000, ge=1)
    """Resamples, of prompts with all their completions, behind the standard error of each confidence interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Level of the intervals."""
    gradient_completions: int = Field(16, ge=2)
    """Completions in the batch of `--gradient`."""
