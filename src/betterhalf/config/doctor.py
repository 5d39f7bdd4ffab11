"""The section `[doctor]`: size of the sample of `betterhalf doctor`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class DoctorConfig(Section):
    """Size of the sample of `betterhalf doctor`; docs/doctor.md has its thresholds."""

    prompts: int = Field(4, ge=1)
    """Number of prompts for the range census and the mismatch sample."""
    group_size: int = Field(4, ge=1)
    """Number of completions of each prompt."""
    max_tokens: int = Field(48, ge=1)
    """Maximum length of a completion, in tokens."""
