"""Words that say which formats of a result are emulated, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from betterhalf.types import EmulatedDtype


def emulated_names(names: Iterable[object]) -> list[str]:
    """Return the emulated formats among the names, each once, the coarsest first."""
    used = {name for name in names if isinstance(name, str)}
    return [name for name in get_args(EmulatedDtype) if name in used]


def precision_words(trainer: str, engine: str) -> str:
    """Return the formats of trainer and engine, one if they are equal; emulated formats are called so."""
    shown = [f"{name} (emulated)" if emulated_names([name]) else name for name in (trainer, engine)]
    return shown[0] if trainer == engine else f"{shown[0]} trainer, {shown[1]} engine"


def emulated_sentence(names: Iterable[object]) -> str:
    """Return a sentence on the emulated formats among the names; empty without any."""
    found = emulated_names(names)
    if not found:
        return ""
    verb, bits = "is" if len(found) == 1 else "are", _listed([name.removeprefix("e8m") for name in found])
    return (
        f"{_listed(found)} {verb} emulated: BF16 arithmetic on a CPU in which every rounded result is rounded once "
        f"more, to {bits} stored mantissa bits. k3 grows as 4^-bits, so this brings the mismatch of long completions "
        "to short ones."
    )


def _listed(words: list[str]) -> str:
    """Return words as in `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
