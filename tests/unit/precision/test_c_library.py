"""C functions: compiled once into the user's cache, and left out where that is impossible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from betterhalf.precision import c_library as module
from betterhalf.precision import emulation
from betterhalf.precision.c_library import c_library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache folder, and forget libraries that are loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    c_library.cache_clear()
    if c_library("emulation.c") is None:
        pytest.skip("there is no C compiler")
    c_library.cache_clear()
    return tmp_path / "betterhalf"


def test_a_source_is_compiled_once_and_nothing_else_is_left_behind(cache: Path) -> None:
    (library,) = cache.iterdir()
    made = library.stat().st_mtime_ns
    assert c_library("emulation.c") is not None
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [made]


def test_another_command_gives_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPILE", (*module._COMPILE, "-g"))
    assert c_library("emulation.c") is not None
    assert len(list(cache.iterdir())) == 2


_LOADED = "from betterhalf.precision.c_library import c_library; print(c_library('emulation.c') is not None)"


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["empty", "truncated"])
def test_a_damaged_library_is_compiled_again(share: float, cache: Path) -> None:
    (library,) = cache.iterdir()
    whole = library.read_bytes()
    library.unlink()  # this process has loaded it
    library.write_bytes(whole[: int(share * len(whole))])
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert library in cache.iterdir() and library.read_bytes() == whole


@pytest.mark.parametrize("trouble", ["no compiler", "source does not compile", "no folder"])
def test_without_a_library_there_is_none(trouble: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in cache.iterdir():
        file.unlink()
    if trouble == "no compiler":
        monkeypatch.setattr(module, "_COMPILE", ("no-such-compiler",))
    elif trouble == "source does not compile":
        monkeypatch.setattr(module, "_COMPILE", (*module._COMPILE, "--no-such-option"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert c_library("emulation.c") is None
    c_library.cache_clear()


def test_the_contract_names_the_way_of_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_kernels", lambda: None)
    assert emulation.emulation_facts("e8m3") == {"emulated": "e8m3: bf16 rounded once more, by torch"}
