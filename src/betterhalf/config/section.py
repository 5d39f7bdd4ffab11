"""The base class of all sections of the configuration."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class of every section: unknown keys are errors and values cannot be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    shorthand: ClassVar[str | None] = None
    """Field that a bare string sets, as in `precision=fp16`; None without one."""
