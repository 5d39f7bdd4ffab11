"""The section `[mismatch]`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class MismatchConfig(Section):
    """Measurement of the gap between trainer and engine."""

    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the step's packs that is measured; a seeded sample when below 1."""
