"""Completion of the command line in real shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from betterhalf import cli
from betterhalf.cli.completion import completion_script
from betterhalf.errors import InputError

pytest.importorskip("shtab", reason="shtab is not installed; scripts/install brings it")

ASK = """
source ./script
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
_betterhalf 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""
CASES = [
    (("tr",), "train"),
    (("probe", "--fr"), "--from-dump"),
    (("train", "precision.loss_scale.fl"), "precision.loss_scale.floor="),
    (("train", "some"), "somewhere/"),
    (("train", "somewhere/m"), "somewhere/mine.toml"),
    (("report", "some"), "somewhere/"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "mine.toml").touch()
    return tmp_path


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_bash_completes(words: tuple[str, ...], expected: str, folder: Path) -> None:
    (folder / "script").write_text(completion_script(cli.VERBS, "bash"))
    command = ["bash", "-c", ASK, "bash", "betterhalf", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes(folder: Path) -> None:
    (folder / "script").write_text(completion_script(cli.VERBS, "zsh"))
    for words, expected in CASES:
        assert expected in zsh_line(folder, f"betterhalf {' '.join(words)}"), words


def zsh_line(folder: Path, typed: str) -> str:
    """Type a line and a tab into an interactive zsh, and return the line as it then stands."""
    environment = os.environ | {"TERM": "dumb", "PS1": "", "HOME": str(folder)}
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe("zsh", ["zsh", "-f", "-i"], environment)
    try:
        start = 'autoload -U compinit; compinit -u; eval "$(cat script)"\n'
        os.write(terminal, f"{start}echo rea''dy\n".encode())
        read_until(terminal, "ready\r")
        os.write(terminal, f"{typed}\t".encode())
        return read_until(terminal, None)
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


def read_until(terminal: int, wanted: str | None) -> str:
    """Read what a terminal shows until a text stands there, or for two seconds."""
    shown, limit = "", time.monotonic() + (30 if wanted else 2)
    while time.monotonic() < limit and not (wanted and wanted in shown):
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x07", "", shown)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="bash and zsh, but got 'fish'"):
        completion_script(cli.VERBS, "fish")
    assert cli.main(["completion", "fish"]) == 2
    assert "error: completion knows bash and zsh" in capsys.readouterr().err


def test_the_verb_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == completion_script(cli.VERBS, "bash")
