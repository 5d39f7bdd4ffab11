"""Read the rows of a data set: a JSONL or Parquet file, a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from betterhalf.errors import InputError, MissingExtraError
from betterhalf.tasks.row import RowError

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks; UTF-32 comes first, because its mark begins like that of UTF-16."""

_FILE_ENDINGS = (".jsonl", ".json", ".parquet")


class WrittenNumber(str):
    """A JSON number as it is written; a float would round it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as it is stored."""

    number: int
    """Number of the row in the source, counted from 1, blank lines included."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields by name; numbers of a JSONL file are `WrittenNumber`."""
    error: RowError | None = None
    """Reason why the row cannot be read; then it has no fields."""


def read_rows(path: str, split: str, subset: str | None, limit: int | None = None) -> list[RawRow]:
    """Read rows, from the first on; unreadable ones carry the reason.

    Args:
        path: JSONL file, Parquet file (by its ending `.parquet`), local folder, or hub name.
        split: split of a folder or hub name.
        subset: subset of a folder or hub name; None for its only one.
        limit: number of rows to read; None for all.

    Raises:
        InputError: the data does not exist, cannot be read, or has no rows.
        MissingExtraError: a folder or hub name, and the package `datasets` is not installed.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        found = _hub_rows(path, split, subset)
    elif file.suffix == ".parquet":
        found = _parquet_rows(file)
    else:
        found = _jsonl_rows(file)
    rows = list(islice(found, limit))
    if not rows:
        raise InputError(f"data set {path!r} is empty; give one with at least one row")
    return rows


def _jsonl_rows(file: Path) -> Iterator[RawRow]:
    """Yield the rows of a JSONL file; blank lines are skipped, but counted."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); give a JSONL file in UTF-8") from error
    encoding = next((name for mark, name in _OTHER_MARKS.items() if data.startswith(mark)), None)
    if encoding is not None:
        raise InputError(f"{file} is in {encoding}; save it as UTF-8")
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            yield _jsonl_row(line, number)


def _jsonl_row(line: bytes, number: int) -> RawRow:
    try:
        return _raw_row(_parsed(line), number)
    except RowError as error:
        return RawRow(number=number, error=error)


def _parsed(line: bytes) -> Any:
    fix = "write each line as one JSON object, in UTF-8"
    try:
        text = line.decode()
        return json.loads(text, parse_int=WrittenNumber, parse_float=WrittenNumber, parse_constant=WrittenNumber)
    except UnicodeDecodeError as error:
        raise RowError(f"it is not UTF-8 ({error.reason} at byte {error.start + 1})", fix) from error
    except ValueError as error:
        raise RowError(f"it is not JSON ({error})", fix) from error
    except RecursionError as error:
        raise RowError("it is nested too deeply", fix) from error


def _raw_row(row: Any, number: int) -> RawRow:
    if isinstance(row, dict):
        return RawRow(number=number, fields=row)
    kind = "number" if isinstance(row, WrittenNumber) else type(row).__name__
    return RawRow(number=number, error=RowError(f"it is a {kind}", "write each row as an object with named fields"))


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, with one batch of rows in memory at a time."""
    import pyarrow.lib
    import pyarrow.parquet

    numbers = iter(range(1, 2**63))
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                yield from (RawRow(number=next(numbers), fields=row) for row in batch.to_pylist())
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise InputError(f"{file} cannot be read as Parquet ({first_line(error)}); restore the file") from error


def _hub_rows(path: str, split: str, subset: str | None) -> Iterator[RawRow]:
    if not Path(path).is_dir() and (Path(path).suffix in _FILE_ENDINGS or path.startswith((".", "/", "~"))):
        raise InputError(f"there is no data file {path!r}; check task.path")
    for number, row in enumerate(_load_data_set(path, split, subset), start=1):
        yield _raw_row(row, number)


def _load_data_set(path: str, split: str, subset: str | None) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        kind = "a folder, and folders need" if Path(path).is_dir() else "not a local file, and the hub needs"
        raise MissingExtraError(
            f"data set {path!r} is {kind} the package datasets; "
            "`pip install betterhalf[hub]`, or give a JSONL or Parquet file"
        ) from error
    names = () if subset is None else (subset,)
    try:
        rows: Iterable[Any] = load_dataset(path, *names, split=split)
    except Exception as error:  # datasets, the hub's client and the network each raise other errors
        chosen = f"split {split!r}" if subset is None else f"subset {subset!r}, split {split!r}"
        raise InputError(
            f"data set {path!r}, {chosen}, cannot be loaded ({first_line(error)}); check task.path, task.subset and "
            f"task.split. Without network, download it elsewhere with `hf download {path} --repo-type dataset "
            "--local-dir DIR` and set task.path to its Parquet or JSONL file"
        ) from error
    return rows


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
