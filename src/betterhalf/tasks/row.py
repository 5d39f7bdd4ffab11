"""A row of a data set, and the reason why a row cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from betterhalf.errors import InputError

Message = dict[str, str]
"""A chat message: `role` and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem as stored in its source, before any template."""

    prompt_id: str
    """Stable name; also names the prompt in `rollouts.jsonl`."""
    place: str
    """Location for messages: file and row number, counted from 1; or the prompt id."""
    question: str
    """Text of the problem."""
    answer: str
    """Gold answer; empty if the data has none."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """All fields of the row, as JSON values."""
    messages: tuple[Message, ...] = field(default=(), hash=False)
    """The question as chat messages of `role` and `content`, whose last one is `question`; empty if it is one text."""
    context: str = ""
    """Everything else in the row that the prompt or the reward depends on, as text; part of the row's digest."""
    defect: BadRow | None = None
    """Reason why the row is not used: it cannot be read (then question and answer are empty), or the filter leaves it
    out or fails on it; None for a good row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used."""

    place: str
    """Location of the row; see `Row.place`."""
    reason: str
    """Problem, as a clause."""
    fix: str
    """Fix, as a clause in the imperative."""
    room: int | None = None
    """Largest `sampling.max_tokens` that fits beside the prompt; set when only that is too large."""
    too_long: bool = False
    """True if a model with a longer context could use the row."""
    filtered: bool = False
    """True if the configuration asks to leave the row out, which is not an error."""


class RowError(InputError):
    """A problem cannot be turned into a prompt."""

    def __init__(self, reason: str, fix: str) -> None:
        """Store what is wrong with the problem, and how to fix it."""
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix
