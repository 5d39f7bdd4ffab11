"""Find question and answer among the fields of a row, and turn all fields into JSON values."""

from __future__ import annotations

import base64
import difflib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from betterhalf.tasks.data_source import WrittenNumber
from betterhalf.tasks.math_answer import MAX_DIGITS, plain_number
from betterhalf.tasks.row import Message, RowError
from betterhalf.tasks.templates import chat_messages

_USUAL = {
    "question_field": ("problem", "question", "prompt", "query", "input", "instruction"),
    "answer_field": (
        "answer",
        "reward_model.ground_truth",
        "extra_info.answer",
        "ground_truth",
        "final_answer",
        "expected_answer",
        "solution",
        "label",
        "target",
    ),
}
"""Setting that names a field -> usual names of that field in public data sets."""

_NUMBERS = (WrittenNumber, int, float, Decimal)
_MOST_INT_DIGITS = 4000
"""Longest whole number that Python converts from text (its own limit is 4300 digits)."""


def question_of(fields: Mapping[str, Any], name: str) -> tuple[str, tuple[Message, ...]]:
    """Return the question as text, and its chat messages if it is a conversation.

    Raises:
        RowError: there is no such field, or it holds neither text nor messages.
    """
    value = lookup(fields, name)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        messages = chat_messages(value)
        return messages[-1]["content"], messages
    return _text(fields, name, "question_field"), ()


def answer_of(fields: Mapping[str, Any], name: str) -> str:
    """Return the gold answer as text; a number becomes its digits, written without an exponent.

    Raises:
        RowError: there is no such field, or it holds neither text nor a finite number of at most `MAX_DIGITS` digits.
    """
    return _text(fields, name, "answer_field")


def lookup(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; dots lead into nested objects, and numbers into lists. None if there is none."""
    if name in fields:
        return fields[name]
    found: Any = fields
    for part in name.split("."):
        if isinstance(found, Mapping):
            found = found.get(part)
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return None
    return found


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields as JSON values: dates and decimals as text, bytes in base64, tuples as lists."""
    return {str(name): _plain(value) for name, value in fields.items()}


def _text(fields: Mapping[str, Any], name: str, setting: str) -> str:
    value = lookup(fields, name)
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        digits = _digits(value)
        if digits is None:
            found = "a huge number" if isinstance(value, int) else str(value)[:40]
            raise RowError(
                f"the field `{name}` is {found}",
                f"give a finite number of at most {MAX_DIGITS} digits, or the answer as text",
            )
        return digits
    if not isinstance(value, str) or not value.strip():
        known = list(dict.fromkeys(_names(fields)))
        found = "holds no text" if name in known else "is missing"
        has = ", ".join(map(repr, known)) or "nothing"
        raise RowError(f"the field `{name}` {found} (the row has {has})", _fix(name, setting, known))
    return value


def _fix(name: str, setting: str, known: Sequence[str]) -> str:
    """Return what to do about a field without text: name another one if the row has it."""
    others = [other for other in known if other != name]
    usual = [other for other in _USUAL[setting] if other in others]
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.7) or usual
    advice = f"give each row the field `{name}`"
    return f"set task.{setting}={near[0]}, or {advice}" if near and name not in known else advice


def _names(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields, nested objects included."""
    for key, value in fields.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")


def _digits(value: WrittenNumber | int | float | Decimal) -> str | None:
    """Return a number's digits; None if it is NaN, infinite or too long to write."""
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        return None
    return plain_number(str(value))


def _plain(value: Any) -> Any:
    if isinstance(value, WrittenNumber):
        return _number(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return plain_fields(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=repr)  # the order of a set differs between processes
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _number(text: WrittenNumber) -> int | float | str:
    """Return a JSON number; a whole number beyond Python's limit stays text."""
    if text.lstrip("-").isdecimal():
        return int(text) if len(text) <= _MOST_INT_DIGITS else str(text)
    return float(text)
