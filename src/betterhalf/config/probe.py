"""The section `[probe]`: sample and confidence intervals of `betterhalf probe`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class ProbeConfig(Section):
    """Sample and confidence intervals of `betterhalf probe`."""

    prompts: int = Field(16, ge=1)
    """Number of prompts, taken from the start of the task."""
    group_size: int = Field(4, ge=1)
    """Number of completions of each prompt."""
    bootstrap: int = Field(1000, ge=1)
    """Number of bootstrap resamples for the standard error of each confidence interval; a resample draws prompts with
    all their completions."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Confidence level of the intervals."""
    gradient_completions: int = Field(16, ge=2)
    """Number of completions in the batch of `--gradient`."""
