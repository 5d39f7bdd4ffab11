"""Read the records of a dump from a file: JSON lines, or tensors that `torch.save` wrote.

Tensors are loaded with `weights_only`, which runs no code from the file. A pickle of a framework's own class needs that
code, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from betterhalf.errors import InputError

_ZIP, _PICKLE, _PARQUET = b"PK\x03\x04", b"\x80", b"PAR1"

Record = Mapping[str, Any] | ValueError
"""One record of a file, or the reason why it cannot be read."""


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield (number from 1, record): the lines of a text file without blank ones, or the batches of a tensor file.

    Raises:
        InputError: the file cannot be read, or has a format that is not read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Give --from-dump a file of JSON lines.") from error
    if start == _PARQUET:
        raise InputError(
            f"{path} is a Parquet file, but --from-dump reads JSON lines. The completions that TRL logs as Parquet "
            "hold only text, no token ids and no logprobs; docs/probe.md shows how to write both."
        )
    if start == _ZIP:
        yield from enumerate(_tensors(path), start=1)
    elif start[:1] == _PICKLE:
        raise InputError(_not_safe(path))
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, Record]]:
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, _parsed(text)


def _parsed(text: bytes) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
    return record if isinstance(record, dict) else ValueError("not a JSON object")


def _tensors(path: Path) -> Iterator[Record]:
    """Yield the batches of a file: one mapping from names to tensors, or a list of them."""
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError or EOFError, depending on the damage
        raise InputError(_not_safe(path)) from error
    batches = loaded if isinstance(loaded, list | tuple) else [loaded]
    for batch in batches:
        if isinstance(batch, Mapping):
            yield {str(name): _plain(value) for name, value in batch.items()}
        else:
            yield ValueError(f"not a mapping from names to tensors, but of type {type(batch).__name__}")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _not_safe(path: Path) -> str:
    return (
        f"{path} is damaged or holds a pickle of other objects than tensors, such as verl's DataProto.save_to_disk "
        "writes, which could run any code when it is loaded. Save plain tensors instead: torch.save({name: batch[name] "
        "for name in names}, PATH); docs/probe.md has the names."
    )
