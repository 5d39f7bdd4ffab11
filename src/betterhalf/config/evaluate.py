"""The section `[evaluate]`: sampling of `betterhalf evaluate`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class EvaluateConfig(Section):
    """Sampling of `betterhalf evaluate`."""

    samples: int = Field(8, ge=1)
    """Number of completions of each prompt: the k of avg@k and pass@k."""
    max_prompts: int | None = Field(None, ge=1)
    """Maximum number of prompts to evaluate; all if absent."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
