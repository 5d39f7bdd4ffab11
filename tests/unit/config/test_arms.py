"""Tables of the arms of a sanity run: what each changes, and the error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from betterhalf.config.load import arm_settings, config_difference, load_config, resolved_json
from betterhalf.config.render import toml_text
from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError

FILE = """
[sanity]
arms = ["bf16", "aligned", "dual"]
[sanity.arm.aligned]
precision = "bf16"
"engine.rounding" = "aligned"
[sanity.arm.dual]
precision.preset = "bf16"
algorithm.preset = "grpo"
algorithm.surrogate.dual_clip = 3.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "arms.toml"
    path.write_text(FILE)
    return path


def changed(config: RunConfig, name: str) -> list[str]:
    return [str(change) for change in config_difference(config, arm_settings(config, name))]


def test_an_arm_is_a_precision_or_what_its_table_changes(file: Path) -> None:
    config = load_config(file)
    precision = 'precision.preset: "fp16" -> "bf16"'
    assert changed(config, "bf16") == [precision]
    assert changed(config, "aligned") == ['engine.rounding: "engine" -> "aligned"', precision]
    assert changed(config, "dual") == ["algorithm.surrogate.dual_clip: none -> 3.0", precision]


def test_a_table_may_be_changed_or_added_on_the_command_line(file: Path) -> None:
    config = load_config(file, ["sanity.arm.dual.algorithm.surrogate.dual_clip=5", "precision=bf16"])
    assert changed(config, "dual") == ["algorithm.surrogate.dual_clip: none -> 5.0"]
    added = load_config(file, ["arms=fp16,new", "sanity.arm.new.precision=fp32", "sanity.arm.new.seed=3"])
    assert added.sanity.arms == ("fp16", "new") and list(added.sanity.arm) == ["new"]


def test_a_layer_above_chooses_among_the_arms(file: Path) -> None:
    assert list(load_config(file, ["arms=fp16,dual"]).sanity.arm) == ["dual"]
    above = file.with_name("above.toml")
    above.write_text(f'extends = "{file.name}"\n[sanity]\narms = ["aligned"]\n')
    assert list(load_config(above).sanity.arm) == ["aligned"]


def test_arms_survive_json_and_toml(file: Path) -> None:
    config = load_config(file, ["sanity.arm.dual.precision.wire_dtype=none"])
    saved = file.with_name("config.json")
    saved.write_text(json.dumps(resolved_json(config)))
    assert load_config(saved) == config
    again = file.with_name("again.toml")
    again.write_text(toml_text(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sanity.arm.dual.engine.roundin=aligned", "unknown key 'engine.roundin'. Did you mean 'engine.rounding'?"),
        ("sanity.arm.dual.engine.roundin=aligned", "[sanity.arm.dual]"),
        ("sanity.arm.dual.training.steps=0", "training.steps = 0 must be at least 1. [sanity.arm.dual]"),
        ("sanity.arm.dual.task.terms=4", "[sanity.arm.dual] sets 'task', which all arms share."),
        ("sanity.arm.dual.model=demo-small", "sets 'model', which all arms share."),
        ("sanity.arm.other.precision=fp16", "[sanity.arm.other] describes an arm that sanity.arms does not list."),
        ("arms=bf16,bf16", "names an arm twice"),
        ("arms=bf16,duel", "Did you mean dual?"),
        ("arms=bf16,coarse_engine", "Describe it in [sanity.arm.coarse_engine]."),
    ],
)
def test_mistakes_are_refused_with_their_fix(file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("fp16", "changes what the name 'fp16' stands for"), ("a b", "Use letters, digits, - and _ only.")],
)
def test_names_that_mislead_or_cannot_be_folders_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate({"sanity": {"arms": [name], "arm": {name: {}}}})
