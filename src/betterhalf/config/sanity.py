"""The section `[sanity]`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import DtypeName


class SanityConfig(Section):
    """The paper's sanity test: a perfectible set, then one arm for each precision."""

    arms: tuple[DtypeName, ...] = Field(("fp16", "bf16"), min_length=1)
    """Precisions to run; the first decides the exit status."""
    candidates: int = Field(320, ge=1)
    """Prompts tried for the perfectible set."""
    samples: int = Field(40, ge=1)
    """Completions of each candidate by the base policy (the paper: 40)."""
    lower: float = Field(0.2, ge=0, le=1)
    """Keep prompts solved at least this often."""
    upper: float = Field(0.8, ge=0, le=1)
    """Keep prompts solved at most this often."""
    pass_accuracy: float = Field(0.95, ge=0, le=1)
    """Final accuracy an arm must reach."""
    evaluation_samples: int = Field(8, ge=1)
    """Completions of each prompt in the final evaluation (avg@8)."""
    arms_at_once: int = Field(0, ge=0)
    """Arms trained at the same time, each in a process of its own with an equal share of the threads. 0 chooses: one
    on a GPU or with vLLM; on a CPU as many as have a core and memory."""

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"sanity.arms={','.join(self.arms)} names an arm twice; name each precision once")
        if self.lower > self.upper:
            raise ValueError(f"sanity.lower={self.lower} exceeds sanity.upper={self.upper}; swap them")
        return self
