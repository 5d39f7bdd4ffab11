"""The section `[sanity]`: the paper's sanity test."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, Self, get_args

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import DtypeName

ArmTables = dict[str, dict[str, Any]]
"""Settings that each arm changes, by the name of the arm."""

_PRECISIONS: tuple[str, ...] = get_args(DtypeName)
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Pattern of names of arms: each names a folder, and a part of a dotted key."""


class SanityConfig(Section):
    """The paper's sanity test: build a perfectible set, then train several arms on it."""

    arms: tuple[str, ...] = Field(("fp16", "bf16"), min_length=1)
    """Arms to train; the first determines the exit status. The name of a precision stands for that precision; the table
    `[sanity.arm.NAME]` describes any other arm."""
    arm: ArmTables = Field(default_factory=dict)
    """Settings that an arm changes: any keys, as on the command line, except those of the perfectible set (`model`,
    `task`, `sanity`)."""
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
        for wrong in self._wrong_arms():
            raise ValueError(wrong)
        if self.lower > self.upper:
            raise ValueError(f"sanity.lower={self.lower} exceeds sanity.upper={self.upper}. Swap them.")
        return self

    def _wrong_arms(self) -> Iterator[str]:
        """Yield an error for each mistake in the arms."""
        if len(set(self.arms)) < len(self.arms):
            yield f"sanity.arms={','.join(self.arms)} names an arm twice. Name each arm once."
        for name in self.arms:
            if name not in (*_PRECISIONS, *self.arm):
                yield _unknown_arm(name, (*_PRECISIONS, *self.arm))
        for name in self.arm:
            if name in _PRECISIONS:
                yield f"[sanity.arm.{name}] changes what the name {name!r} stands for. Give the arm another name."
            if _ARM_NAME.fullmatch(name) is None:
                yield f"the arm {name!r} names a folder. Use letters, digits, - and _ only."
            if name not in self.arms:
                yield f"[sanity.arm.{name}] describes an arm that sanity.arms does not list. List it, or remove it."


def _unknown_arm(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"Did you mean {near[0]}?" if near else f"Describe it in [sanity.arm.{name}]."
    return f'sanity.arms = "{name}" is not one of {", ".join(known)}. {fix}'
