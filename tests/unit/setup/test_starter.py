"""`betterhalf new` writes an experiment that the configuration accepts and a reward that can be called."""

from __future__ import annotations

import json
import runpy
import tomllib
from pathlib import Path

import pytest

from betterhalf import cli
from betterhalf.config.load import load_config
from betterhalf.errors import InputError
from betterhalf.setup.starter import write_starter
from betterhalf.user_code import load_object, require_call


def test_three_files_are_written_and_the_start_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "mine.toml", "mine_reward.py"]
    assert "start       betterhalf train mine.toml" in capsys.readouterr().out
    assert cli.main(["new", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "verb": "new",
        "experiment": "other.toml",
        "reward": "other_reward.py",
        "data": "other.jsonl",
    }


def test_the_configuration_accepts_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(write_starter("mine")["experiment"])
    assert config.name == "mine"
    task = config.task.model_dump()
    assert (task["type"], task["path"], task["reward"]) == ("python", "mine.jsonl", "mine_reward.py:reward")
    assert cli.main(["config", "mine.toml"]) == 0


def test_every_key_of_the_experiment_has_a_comment_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_starter("mine")["experiment"].read_text(encoding="ascii")
    assert tomllib.loads(text)["task"]["type"] == "python"
    blocks = [block for block in text.split("\n\n") if "=" in block]
    assert all("#" in block for block in blocks)
    assert max(map(len, text.splitlines())) <= 120


def test_the_reward_can_be_called_as_the_task_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_starter("mine")
    reward = load_object("mine_reward.py:reward", "task.reward")
    require_call(reward, "", ("prompts", "completions", "metadata"), "task.reward")
    row = {"problem": "1+2=", "answer": "3"}
    assert reward(["1+2="] * 4, ["2=3.", "2=4.", "", "2=x"], [row] * 4) == [1.0, 0.1, 0.0, 0.0]


def test_the_data_has_a_problem_and_its_answer_in_every_row(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_starter(str(tmp_path / "mine"))["data"].read_text().splitlines()]
    assert len(rows) == 256 and len({row["problem"] for row in rows}) > 250
    assert all(str(sum(map(int, row["problem"].removesuffix("=").split("+")))) == row["answer"] for row in rows)


def test_paths_are_those_from_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_starter("folder/deep/mine.toml")
    assert files["experiment"] == Path("folder/deep/mine.toml")
    task = tomllib.loads(files["experiment"].read_text())["task"]
    assert (task["path"], task["reward"]) == ("folder/deep/mine.jsonl", "folder/deep/mine_reward.py:reward")
    assert runpy.run_path("folder/deep/mine_reward.py")["reward"]([], [], []) == []


@pytest.mark.parametrize("folder", ['a"b', "a:b", "a\\b"])
def test_a_folder_that_breaks_the_paths_of_the_experiment_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="Choose a folder without quotes"):
        write_starter(f"{folder}/mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".toml", "_reward.py", ".jsonl"])
def test_nothing_is_overwritten(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"mine{suffix}").write_text("precious")
    with pytest.raises(InputError, match=f"mine{suffix} exists already"):
        write_starter("mine")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["a b", "", "-x", "na\u00efve", ".hidden", "a\nb"])
def test_a_name_that_cannot_be_one_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be the name of an experiment"):
        write_starter(name)
    assert list(tmp_path.iterdir()) == []
