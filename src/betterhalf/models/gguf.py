"""What a GGUF file says about its tokenizer and transformers leaves out.

A GGUF file begins with metadata, key after key, before the table of tensors and the tensors themselves:

    "GGUF"  version: u32  number of tensors: u64  number of keys: u64
    for each key:  name: string  type: u32  value
    string: length: u64, bytes        array: type: u32, count: u64, values
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO

from betterhalf.errors import InputError

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> its bytes: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64."""

_FLAGS = {f"tokenizer.ggml.{name}": name for name in ("add_bos_token", "add_eos_token")}


def tokenizer_flags(path: Path) -> dict[str, bool]:
    """Which tokens the file says a tokenizer puts around a text: `add_bos_token`, `add_eos_token`, where it says so.

    Raises:
        InputError: this is no GGUF file, or it ends within its metadata.
    """
    try:
        with path.open("rb") as file:
            return _flags(file)
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no whole GGUF file: its metadata cannot be read; get it again") from error


def _flags(file: IO[bytes]) -> dict[str, bool]:
    magic, _, _, keys = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        raise KeyError(magic)
    found: dict[str, bool] = {}
    for _ in range(keys):
        name, (kind,) = _string(file), struct.unpack("<I", file.read(4))
        if name in _FLAGS and kind == _BOOL:
            found[_FLAGS[name]] = bool(file.read(1)[0])
        else:
            _skip(file, kind)
    return found


def _string(file: IO[bytes]) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8")


def _skip(file: IO[bytes], kind: int) -> None:
    if kind == _STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(length, os.SEEK_CUR)
    elif kind == _ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in _SIZES:
            file.seek(count * _SIZES[inner], os.SEEK_CUR)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        file.seek(_SIZES[kind], os.SEEK_CUR)
