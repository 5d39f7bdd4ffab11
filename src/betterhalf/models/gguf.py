"""Metadata of a GGUF file: read once for transformers, and the tokenizer's settings that transformers ignores.

A GGUF file begins with its metadata, a list of keys and values, followed by the table of tensors and the tensors:

    "GGUF"  version: u32  number of tensors: u64  number of keys: u64
    for each key:  name: string  type: u32  value
    string: length: u64, bytes        array: type: u32, count: u64, values
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from betterhalf.errors import InputError

_STRING, _ARRAY, _BOOL, _U32 = 8, 9, 7, 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> size in bytes: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64."""

_PREFIX = "tokenizer.ggml."
_FLAGS = ("add_bos_token", "add_eos_token")
_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe")
"""Names under which files declare Llama 3's way of splitting text before byte-level BPE."""


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers read configuration, tokenizer and weights of a GGUF file with one reader instead of three.

    A reader is a view of a file that does not change, and making one takes seconds for a large vocabulary. The last one
    is kept until `forget_reader`.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    library: Any = importlib.import_module("gguf")
    before, library.GGUFReader = library.GGUFReader, _reader
    try:
        yield
    finally:
        library.GGUFReader = before


def forget_reader() -> None:
    """Free the reader that `read_once` keeps; call it once the weights are loaded."""
    _made.cache_clear()


def _reader(path: str | Path) -> Any:
    """Return a reader of the file as it is now."""
    found = Path(path).stat()
    return _made(str(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1)
def _made(path: str, _changed: int, _size: int) -> Any:
    from gguf.gguf_reader import GGUFReader  # an extra

    class Reader(GGUFReader):  # type: ignore[misc, unused-ignore]
        """Reader that cuts its parts out of a plain array: from a memory map each of them costs three times as much."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain: Any = mapped.view(np.ndarray)

    return Reader(path)


def tokenizer_flags(path: Path) -> dict[str, bool]:
    """Return the flags for tokens that the tokenizer adds around a text: `add_bos_token`, `add_eos_token`.

    A missing flag is filled in as in llama.cpp: sentencepiece and Llama 3 tokenizers add a begin token.

    Raises:
        InputError: the file is not in GGUF format, or its metadata is incomplete or damaged.
    """
    try:
        with path.open("rb") as file:
            found = _tokenizer_entries(file)
    except (struct.error, LookupError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a complete GGUF file: its metadata cannot be read; download it again"
        ) from error
    flags = {name: bool(found[name]) for name in _FLAGS if isinstance(found.get(name), bool)}
    if found.get("model") == "llama" or found.get("pre") in _LLAMA_3:
        flags.setdefault("add_bos_token", True)
    return flags


def declares_end_token(path: Path) -> bool:
    """Return whether a GGUF file names the token that ends a text.

    The file must have passed `tokenizer_flags`, which checks its metadata.
    """
    with path.open("rb") as file:
        return "eos_token_id" in _tokenizer_entries(file)


def _tokenizer_entries(file: IO[bytes]) -> dict[str, str | bool | int]:
    """Return the tokenizer's metadata of type string, bool or u32 by name, without the prefix."""
    magic, _, _, keys = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        raise KeyError(magic)
    found: dict[str, str | bool | int] = {}
    for _ in range(keys):
        name, (kind,) = _string(file), struct.unpack("<I", file.read(4))
        if name.startswith(_PREFIX) and kind in (_BOOL, _STRING, _U32):
            found[name.removeprefix(_PREFIX)] = _value(file, kind)
        else:
            _skip(file, kind)
    return found


def _value(file: IO[bytes], kind: int) -> str | bool | int:
    if kind == _STRING:
        return _string(file)
    if kind == _BOOL:
        return bool(file.read(1)[0])
    return int(struct.unpack("<I", file.read(4))[0])


def _string(file: IO[bytes]) -> str:
    return file.read(_within(file, *struct.unpack("<Q", file.read(8)))).decode("utf-8")


def _within(file: IO[bytes], length: int) -> int:
    """Return the length of a part; ValueError if it is beyond the file's size."""
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError(f"a part of {length} bytes is longer than the file")
    return length


def _skip(file: IO[bytes], kind: int) -> None:
    if kind == _STRING:
        file.seek(_within(file, *struct.unpack("<Q", file.read(8))), os.SEEK_CUR)
    elif kind == _ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in _SIZES:
            file.seek(_within(file, count * _SIZES[inner]), os.SEEK_CUR)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        file.seek(_SIZES[kind], os.SEEK_CUR)
