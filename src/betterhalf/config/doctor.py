"""The section `[doctor]`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class DoctorConfig(Section):
    """How much `doctor` looks at; its thresholds are in docs/doctor.md."""

    prompts: int = Field(4, ge=1)
    """Prompts for the range census and the mismatch sample."""
    group_size: int = Field(4, ge=1)
    """Completions of each prompt."""
    max_tokens: int = Field(48, ge=1)
    """Length limit of a completion in the doctor's sample."""
