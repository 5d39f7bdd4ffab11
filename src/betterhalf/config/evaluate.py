"""The section `[evaluate]`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class EvaluateConfig(Section):
    """How `evaluate` samples."""

    samples: int = Field(8, ge=1)
    """Completions of each prompt: the k of avg@k and pass@k."""
    max_prompts: int | None = Field(None, ge=1)
    """Evaluate on the first so many prompts; all if absent."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
