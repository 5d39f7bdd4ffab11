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
    """Return the library made of the file `name` of this folder; None if it cannot be compiled or loaded here."""
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(name))))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: no home folder
        return None


def _compiled(source: Path) -> Path:
    """Return the compiled library of a source file; its name has a digest of source, command and compiler."""
    compiler = subprocess.run((_COMPILE[0], "--version"), capture_output=True, check=True, timeout=60).stdout
    parts = (source.read_bytes(), " ".join(_COMPILE).encode(), compiler, platform.machine().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = _cache_folder() / f"{source.stem}-{key}.so"
    if not target.exists():
        _compile(source, target)
    return target


def _compile(source: Path, target: Path) -> None:
    """Compile to a temporary file and rename it, so that processes that start together see a whole library or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        subprocess.run((*_COMPILE, "-o", str(made), str(source)), capture_output=True, check=True, timeout=120)
        os.replace(made, target)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "betterhalf")
