"""Configurations from Python: paths, mappings, configurations, and settings on top."""

from __future__ import annotations

from pathlib import Path

import pytest

from betterhalf.config.load import configuration_of, load_config
from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError

DEMO = "experiments/base/demo.toml"


def test_every_form_gives_the_configuration_of_the_command_line() -> None:
    expected = load_config(DEMO, ["precision=bf16", "training.steps=3", "optimizer.learning_rate=1e-5"])
    nested = {"precision": "bf16", "training": {"steps": 3}, "optimizer": {"learning_rate": 1e-5}}
    dotted = {"precision.preset": "bf16", "training.steps": 3, "optimizer.learning_rate": 1e-5}
    assert configuration_of(DEMO, nested) == configuration_of(DEMO, dotted) == expected
    assert configuration_of(Path(DEMO), dotted) == expected
    assert configuration_of({"extends": DEMO, **nested}) == expected
    assert configuration_of(load_config(DEMO), nested) == expected
    assert configuration_of(expected) == expected
    assert configuration_of(None) == RunConfig()


def test_keyword_arguments_win_over_the_mapping() -> None:
    assert configuration_of({"training": {"steps": 3, "group_size": 2}}, {"training": {"steps": 5}}).training.steps == 5
    assert configuration_of({"training.steps": 3}, {"seed": 1}).training.steps == 3


def test_a_preset_on_top_of_a_configuration_brings_its_own_choices() -> None:
    base = configuration_of(None, {"algorithm": "dapo"})
    assert (
        configuration_of(base, {"algorithm": "gspo"}).algorithm
        == configuration_of(None, {"algorithm": "gspo"}).algorithm
    )
    changed = configuration_of(base, {"algorithm": {"surrogate": {"upper": 1.5}}}).algorithm
    assert (changed.preset, changed.surrogate.upper, changed.dynamic_sampling) == ("dapo", 1.5, True)


def test_short_keys_and_sections_with_types_work() -> None:
    assert configuration_of(None, {"arms": ("fp16",)}).sanity.arms == ("fp16",)
    assert configuration_of(None, {"engine": "vllm"}).engine.type == "vllm"
    assert configuration_of(None, {"task": {"type": "math", "path": Path("x.jsonl")}}).task.path == "x.jsonl"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 1e-5}, "unknown key 'lr'. Did you mean 'optimizer.learning_rate'\\? \\[keyword argument\\]"),
        ({"training": {"steps": "3"}}, 'training.steps = "3" must be a whole number. \\[keyword argument\\]'),
        ({"training": 3}, "training is a section"),
        ({"precision": "fp61"}, "Did you mean fp16"),
    ],
)
def test_errors_are_those_of_a_file_and_name_their_source(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configuration_of(None, settings)


def test_a_mapping_is_named_as_the_source() -> None:
    with pytest.raises(ConfigError, match="\\[mapping\\]"):
        configuration_of({"training": {"stpes": 3}})
    with pytest.raises(ConfigError, match="there is no experiment file"):
        configuration_of({"extends": "nothing.toml"})
