"""Rows of `problem` and `answer`: from a JSONL file, or from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from betterhalf.errors import InputError, MissingExtraError
from betterhalf.tasks.row import BadRow


@dataclass(frozen=True, slots=True, kw_only=True)
class MathRow:
    """One problem of the data set."""

    problem: str
    """The question, in plain text or LaTeX."""
    answer: str
    """The gold answer, without \\boxed."""
    number: int = field(default=0, compare=False)
    """Place in the source, counted from 1 as an editor does, blank lines included."""
    defect: BadRow | None = field(default=None, compare=False)
    """Set when the row cannot be read; then problem and answer are empty."""


def load_rows(path: str, split: str) -> list[MathRow]:
    """All rows of a JSONL file, of a local folder, or of a data set on the hub.

    Raises:
        InputError: no such data, no rows, or a row that is not an object with the two fields.
        MissingExtraError: a folder or hub name, and the package `datasets` is not installed.
    """
    file = Path(path).expanduser()
    rows = _jsonl_rows(file) if file.is_file() else _data_set_rows(path, split)
    if not rows:
        raise InputError(f"data set {path!r} is empty; give one with at least one row of `problem` and `answer`")
    return rows


def _jsonl_rows(file: Path) -> list[MathRow]:
    """Rows of a JSONL file; blank lines are passed over, but counted."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({error}); give a JSONL file in UTF-8") from error
    return [_parse(line, number, str(file)) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: str, number: int, source: str) -> MathRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{source}, row {number}, is not JSON ({error}); each line must be one object with `problem` and `answer`"
        ) from error
    return _row(row, number, source)


def _row(row: Any, number: int, source: str) -> MathRow:
    if not isinstance(row, dict):
        raise InputError(
            f"{source}, row {number}, is a {type(row).__name__}; it must be an object with `problem` and `answer`"
        )
    problem, answer = (_field(row, name, number, source) for name in ("problem", "answer"))
    return MathRow(problem=problem, answer=answer, number=number)


def _field(row: dict[str, Any], name: str, number: int, source: str) -> str:
    """A field as text; a number is as good as its digits."""
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        found = "holds no text" if name in row else "is missing"
        raise InputError(
            f"{source}, row {number}: the field `{name}` {found}; each row needs `problem` and `answer`, "
            f"and this one has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return value


def _data_set_rows(path: str, split: str) -> list[MathRow]:
    if not Path(path).is_dir() and (Path(path).suffix in (".jsonl", ".json") or path.startswith((".", "/", "~"))):
        raise InputError(f"there is no data file {path!r}; check task.path")
    return [_row(row, number, path) for number, row in enumerate(_load_data_set(path, split), start=1)]


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
