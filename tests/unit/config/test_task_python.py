"""The section `[task]` of rewards and tasks of one's own: its forms, and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from betterhalf.config.load import config_difference, load_config
from betterhalf.config.render import toml_text
from betterhalf.config.schema import PythonTask, RewardTerm
from betterhalf.errors import ConfigError

PYTHON = ("task=python", "task.path=rows.jsonl")


def task(*overrides: str) -> PythonTask:
    found = load_config(None, [*PYTHON, *overrides]).task
    assert isinstance(found, PythonTask)
    return found


def test_one_reward_has_the_name_of_its_function() -> None:
    assert task("task.reward=mine.py:score").terms == {"score": RewardTerm(function="mine.py:score")}
    assert task("task.reward=a.b:Judge.score", "task.batched=false").terms == {
        "Judge_score": RewardTerm(function="a.b:Judge.score", batched=False)
    }


def test_several_rewards_are_tables_or_import_paths(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(
        '[task]\ntype = "python"\npath = "rows.jsonl"\nnormalise = "group"\nclip = [-1, 2.5]\n'
        '[task.rewards]\nshort = "a:f"\n[task.rewards.right]\nfunction = "b:g"\nweight = 2\nbatched = false\n'
    )
    expected = {"short": RewardTerm(function="a:f"), "right": RewardTerm(function="b:g", weight=2.0, batched=False)}
    config = load_config(file)
    assert isinstance(config.task, PythonTask)
    assert config.task.terms == expected and config.task.clip == (-1.0, 2.5)
    again = tmp_path / "again.toml"
    again.write_text(toml_text(config))
    assert config_difference(load_config(again), config) == []


def test_one_of_several_rewards_is_changed_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text('task.type = "python"\ntask.path = "r"\ntask.rewards.short = "a:f"\ntask.rewards.right = "b:g"\n')
    config = load_config(file, ["task.rewards.short.weight=0.5", "task.rewards.third=c:h"])
    assert isinstance(config.task, PythonTask)
    assert config.task.terms == {
        "short": RewardTerm(function="a:f", weight=0.5),
        "right": RewardTerm(function="b:g"),
        "third": RewardTerm(function="c:h"),
    }


def test_settings_of_a_class_are_free(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text('[task]\ntype = "python"\ntask = "m:C"\n[task.settings]\nlevels = [1, 2]\nname = "x"\n')
    config = load_config(file, ["task.settings.depth=3", "task.clip=none"])
    assert isinstance(config.task, PythonTask)
    assert config.task.settings == {"levels": [1, 2], "name": "x", "depth": 3}
    assert config.task.clip is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("task=python", "task.reward=a:f"), "has neither path nor task. Set task.path to a data file"),
        (
            (*PYTHON, "task.reward=a:f", "task.task=m:C"),
            "sets both path and task, also if one comes from a file that it extends. Remove one.",
        ),
        (PYTHON, "has no reward. Set task.reward to module:function or file.py:function"),
        ((*PYTHON, "task.reward=a:f", "task.rewards.b=b:g"), "task.reward and task.rewards are both set"),
        ((*PYTHON, "task.reward=a:f", "task.settings.x=1"), "task.settings are for the class of task.task"),
        ((*PYTHON, "task.reward=a:f", "task.clip=1,0"), "is empty. Give the lowest reward, then the highest"),
        ((*PYTHON, "task.reward=a:f", "task.clip=1"), "task.clip"),
        ((*PYTHON, "task.reward=a:f", "task.scale=0"), "task.scale=0.0 leaves no reward"),
        ((*PYTHON, "task.reward=a:f", "task.time_limit=0"), "task.time_limit = 0 must be above 0"),
        ((*PYTHON, "task.reward=a:f", "task.workers=0"), "task.workers = 0 must be at least 1"),
        ((*PYTHON, "task.reward=a:f", "task.on_error=skip"), "is not one of score, stop"),
        ((*PYTHON, "task.reward=a:f", "task.normalise=groups"), "Did you mean group?"),
        ((*PYTHON, "task.rewards.b=b:g", "task.rewards.b.wieght=2"), "unknown key 'task.rewards.b.wieght'. Did you"),
        ((*PYTHON, "task.rewards.b.weight=2"), "task.rewards.b.function is required (Import path:"),
        ((*PYTHON, "task.rewards.b=b:g", "task.rewards.b.weight=0"), "every reward has weight 0"),
        ((*PYTHON, "task.rewards.b.function=b:g", "task.rewards.b.weight=x"), "task.rewards.b.weight"),
        ((*PYTHON, "task.rewrad=a:f"), "Did you mean 'task.reward'?"),
    ],
)
def test_bad_settings_are_refused_with_the_fix(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert words in str(caught.value)
