"""C functions of this package, compiled once for each user by the system's compiler and loaded with ctypes.

Without a compiler, or without a folder to keep the library in, callers use torch operations with the same results.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_COMPILE = ("cc", "-O3", "-std=c99", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
"""Command of the compiler. No flag changes the value of a result, or uses instructions that another machine lacks."""


@cache
def c_library(name: str) -> ctypes.CDLL | None:
    """Return the library compiled from the file `name` of this folder; None if it cannot be compiled or loaded."""
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(name))))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: no home folder
        return None


def _compiled(source: Path) -> Path:
    """Return the compiled library of a source file, compiled again if it is damaged.

    Its name has a digest of source, command, compiler and machine, and one of its own content: loading a truncated
    library may kill the process.
    """
    compiler = subprocess.run((_COMPILE[0], "--version"), capture_output=True, check=True, timeout=60).stdout
    parts = (source.read_bytes(), " ".join(_COMPILE).encode(), compiler, platform.machine().encode())
    stem = f"{source.stem}-{_digest(*parts)}"
    kept = _cache_folder().glob(f"{stem}-*.so")
    return next(filter(_is_whole, kept), None) or _compile(source, stem)


def _compile(source: Path, stem: str) -> Path:
    """Compile to a temporary file and rename it, so that processes that start together see a whole library or none."""
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary, f"{stem}.so")
        subprocess.run((*_COMPILE, "-o", str(made), str(source)), capture_output=True, check=True, timeout=120)
        target = folder / f"{stem}-{_digest(made.read_bytes())}.so"
        os.replace(made, target)
    return target


def _is_whole(library: Path) -> bool:
    return library.stem.endswith(f"-{_digest(library.read_bytes())}")


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "betterhalf")
