"""The section `[mismatch]`: measurement of the gap between trainer and engine."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class MismatchConfig(Section):
    """Measurement of the gap between trainer and engine."""

    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the step's packs to measure; below 1, a seeded sample of them."""
