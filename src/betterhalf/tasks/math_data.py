"""Load rows of `problem` and `answer` from a JSONL file or from the Hugging Face hub."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from betterhalf.errors import InputError, MissingExtraError
from betterhalf.tasks.math_answer import MAX_DIGITS, plain_number
from betterhalf.tasks.row import BadRow, RowError

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks; UTF-32 comes first, because its mark begins like that of UTF-16."""


class _Number(str):
    """A JSON number as it is written; a float would round it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MathRow:
    """One problem of the data set."""

    problem: str
    """The question, in plain text or LaTeX."""
    answer: str
    """The gold answer, without \\boxed."""
    number: int = field(default=0, compare=False)
    """Number of the row in the source, counted from 1, blank lines included."""
    defect: BadRow | None = field(default=None, compare=False)
    """Set when the row cannot be read; then problem and answer are empty."""


def load_rows(path: str, split: str) -> list[MathRow]:
    """Load all rows of a JSONL file, a local folder or a data set on the hub; unreadable rows carry the reason.

    Raises:
        InputError: the data does not exist, cannot be read, or has no rows.
        MissingExtraError: a folder or hub name, and the package `datasets` is not installed.
    """
    file = Path(path).expanduser()
    rows = _jsonl_rows(file) if file.is_file() else _data_set_rows(path, split)
    if not rows:
        raise InputError(f"data set {path!r} is empty; give one with at least one row of `problem` and `answer`")
    return rows


def _jsonl_rows(file: Path) -> list[MathRow]:
    """Return the rows of a JSONL file; blank lines are skipped, but counted."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); give a JSONL file in UTF-8") from error
    encoding = next((name for mark, name in _OTHER_MARKS.items() if data.startswith(mark)), None)
    if encoding is not None:
        raise InputError(f"{file} is in {encoding}; save it as UTF-8")
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return [_read(_parse, line, place=f"{file}, row {number}", number=number) for number, line in numbered]


def _read(parse: Callable[[Any], tuple[str, str]], source: Any, *, place: str, number: int) -> MathRow:
    """Parse a row; if that fails, return it with the reason and without a problem and an answer."""
    try:
        problem, answer = parse(source)
    except RowError as error:
        defect = BadRow(place=place, reason=error.reason, fix=error.fix)
        return MathRow(problem="", answer="", number=number, defect=defect)
    return MathRow(problem=problem, answer=answer, number=number)


def _parse(line: bytes) -> tuple[str, str]:
    fix = "write each line as one object with `problem` and `answer`, in UTF-8"
    try:
        return _fields(json.loads(line.decode(), parse_int=_Number, parse_float=_Number, parse_constant=_Number))
    except UnicodeDecodeError as error:
        raise RowError(f"it is not UTF-8 ({error.reason} at byte {error.start + 1})", fix) from error
    except ValueError as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"it is not JSON ({error})", fix) from error
    except RecursionError as error:
        raise RowError("it is nested too deeply", fix) from error


def _fields(row: Any) -> tuple[str, str]:
    if not isinstance(row, dict):
        kind = "number" if isinstance(row, _Number) else type(row).__name__
        raise RowError(f"it is a {kind}", "write each row as an object with `problem` and `answer`")
    return _field(row, "problem"), _field(row, "answer")


def _field(row: dict[str, Any], name: str) -> str:
    """Return a field as text; a number becomes its digits, written without an exponent."""
    value = row.get(name)
    if isinstance(value, _Number | int | float | Decimal) and not isinstance(value, bool):
        digits = _digits(value)
        if digits is None:
            found = "a huge number" if isinstance(value, int) else str(value)[:40]
            raise RowError(
                f"the field `{name}` is {found}",
                f"give a finite number of at most {MAX_DIGITS} digits, or the answer as text",
            )
        return digits
    if not isinstance(value, str) or not value.strip():
        found = "holds no text" if name in row else "is missing"
        has = ", ".join(map(repr, row)) or "nothing"
        raise RowError(f"the field `{name}` {found} (the row has {has})", "give each row `problem` and `answer`")
    return value


def _digits(value: _Number | int | float | Decimal) -> str | None:
    """Return a number's digits; None if it is NaN, infinite or too long to write."""
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        return None
    return plain_number(str(value))


def _data_set_rows(path: str, split: str) -> list[MathRow]:
    if not Path(path).is_dir() and (Path(path).suffix in (".jsonl", ".json") or path.startswith((".", "/", "~"))):
        raise InputError(f"there is no data file {path!r}; check task.path")
    numbered = enumerate(_load_data_set(path, split), start=1)
    return [_read(_fields, row, place=f"{path}, row {number}", number=number) for number, row in numbered]


def _load_data_set(path: str, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            f"data set {path!r} is not a local JSONL file, and the hub needs the package datasets; "
            "`pip install betterhalf[hub]`, or give a JSONL file"
        ) from error
    try:
        rows: Iterable[Any] = load_dataset(path, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"data set {path!r}, split {split!r}, cannot be loaded ({_first_line(error)}); "
            "check task.path and task.split, or give a JSONL file"
        ) from error
    return rows


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
