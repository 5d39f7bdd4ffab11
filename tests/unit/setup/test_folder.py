"""The folder of a run, and the message about it after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.run_dir import RunDir
from betterhalf.run_lock import run_lock
from betterhalf.runs.sanity import run_arm
from betterhalf.runs.sweep_cell import run_cell
from betterhalf.setup.folder import run_folder


def test_an_interruption_names_the_folder_that_holds_something(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    words = f"^interrupted; finished work is in {path}$"
    with pytest.raises(KeyboardInterrupt, match=words), run_folder(str(path), "probe", "demo") as run:
        (run.path / "probe.json").write_text("{}")
        raise KeyboardInterrupt
    assert (path / "probe.json").exists()


@pytest.mark.parametrize("verb", ["train", "sanity", "evaluate"])
def test_an_interruption_of_what_can_be_continued_says_how(verb: str, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt, match="; --resume continues it$"),
        run_folder(str(tmp_path), verb, "x") as run,
    ):
        run.metrics.write_text("")
        raise KeyboardInterrupt


def test_an_interruption_before_anything_was_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="^$"), run_folder(str(tmp_path / "deep" / "run"), "probe", "demo"):
        raise KeyboardInterrupt
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("work", [run_arm, run_cell])
def test_arms_and_cells_are_not_trained_where_another_process_works(
    work: Callable[[RunConfig, str, RunDir], object], tmp_path: Path
) -> None:
    with run_lock(tmp_path), pytest.raises(InputError, match="another process works in"):
        work(RunConfig(), "x", RunDir(tmp_path))
