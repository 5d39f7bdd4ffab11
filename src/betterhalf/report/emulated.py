"""A sentence that says which formats of a result are emulated, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from betterhalf.types import EmulatedDtype


def emulated_sentence(names: Iterable[object]) -> str:
    """Return a sentence on the emulated formats among the names; empty without any."""
    used = set(names)
    found = [name for name in get_args(EmulatedDtype) if name in used]
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
