"""Both sides report what they really run; the contract compares the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from betterhalf.types import DtypeName


@dataclass(frozen=True, slots=True, kw_only=True)
class SideReport:
    """What one side reports of itself, read from its live tensors rather than from its configuration."""

    side: Literal["trainer", "engine"]
    dtypes: dict[str, DtypeName]
    """Region -> format. Trainer: weights, compute, wire, lm_head, rope, norm, master, gradients, optimizer.
    Engine: weights, compute, wire, kv, lm_head, rope, norm."""
    facts: dict[str, str]
    """Attention backend, how matrix products sum, rounding points, library versions, device."""
    digests: dict[str, str]
    """Unfused Hugging Face parameter name -> digest of the tensor as held."""
