"""The section `[sanity]`: the paper's sanity test."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import DtypeName


class SanityConfig(Section):
    """The paper's sanity test: build a perfectible set, then train one arm in each precision."""

    arms: tuple[DtypeName, ...] = Field(("fp16", "bf16"), min_length=1)
    """Precisions to train in; the first determines the exit status."""
    candidates: int = Field(320, ge=1)
    """Number of prompts tried for the perfectible set."""
    samples: int = Field(40, ge=1)
    """Number of completions of each candidate by the base policy (the paper: 40)."""
    lower: float = Field(0.2, ge=0, le=1)
    """Smallest share of correct completions for a prompt to be kept."""
    upper: float = Field(0.8, ge=0, le=1)
    """Largest share of correct completions for a prompt to be kept."""
    pass_accuracy: float = Field(0.95, ge=0, le=1)
    """Final accuracy that an arm needs to pass."""
    evaluation_samples: int = Field(8, ge=1)
    """Number of completions of each prompt in the final evaluation (avg@8)."""
    arms_at_once: int = Field(0, ge=0)
    """Number of arms to train at the same time, each in its own process with an equal share of the threads. 0 chooses:
    one on a GPU or with vLLM; on a CPU, as many as cores and memory allow."""

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"sanity.arms={','.join(self.arms)} names an arm twice. Name each precision once.")
        if self.lower > self.upper:
            raise ValueError(f"sanity.lower={self.lower} exceeds sanity.upper={self.upper}. Swap them.")
        return self
