"""A row of a data set, and why a row cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from betterhalf.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem as its source holds it, before any template."""

    prompt_id: str
    """Stable name; also names the prompt in `rollouts.jsonl`."""
    place: str
    """Place where a person finds it: file and row number, counted from 1 as an editor does; or the prompt id."""
    question: str
    answer: str
    """Gold answer."""
    defect: BadRow | None = None
    """Set when the row cannot be read; then question and answer are empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used."""

    place: str
    """The `place` of `Row`."""
    reason: str
    """Defect, as a clause."""
    fix: str
    """Remedy, as a clause in the imperative."""
    room: int | None = None
    """Largest `sampling.max_tokens` that fits beside the prompt; set when only that is too large."""


class RowError(InputError):
    """One problem cannot be put to the model."""

    def __init__(self, reason: str, fix: str) -> None:
        """Say what is wrong with the problem, and what to do about it."""
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix
