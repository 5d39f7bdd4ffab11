"""The section `[evaluate]`: data sets that the user names, and the k of pass@k."""

from __future__ import annotations

from pathlib import Path

import pytest

from betterhalf.config.load import load_config, resolved_json
from betterhalf.config.render import toml_text
from betterhalf.config.schema import ArithmeticTask, MathTask, RunConfig
from betterhalf.errors import ConfigError

FILE = """
[evaluate]
k = [4, 1]
[evaluate.data.sums]
seed = 5
[evaluate.data.gsm]
type = "math"
path = "x.jsonl"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text(FILE)
    return path


def test_each_data_set_has_the_keys_of_its_type(file: Path) -> None:
    config = load_config(file, ("evaluate.data.words=arithmetic", "evaluate.data.words.style=auto"))
    assert config.evaluate.data == {
        "sums": ArithmeticTask(seed=5),
        "gsm": MathTask(path="x.jsonl"),
        "words": ArithmeticTask(style="auto"),
    }
    assert config.evaluate.ks == (1, 4)
    again = file.with_name("again.toml")
    again.write_text(toml_text(config))
    assert resolved_json(load_config(again)) == resolved_json(config)


def test_another_type_drops_the_keys_of_the_first(file: Path) -> None:
    config = load_config(file, ("evaluate.data.gsm.type=arithmetic",))
    assert config.evaluate.data["gsm"] == ArithmeticTask()


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, (1,)), (2, (1, 2)), (7, (1, 2, 4)), (8, (1, 2, 4, 8)), (48, (1, 2, 4, 8, 16, 32))]
)
def test_the_k_are_powers_of_two_up_to_the_samples(samples: int, ks: tuple[int, ...]) -> None:
    assert RunConfig.model_validate({"evaluate": {"samples": samples}}).evaluate.ks == ks


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.k=1,16", "holds 16, but pass@k and maj@k need k from 1 to evaluate.samples=8"),
        ("evaluate.k=0", "holds 0"),
        ("evaluate.best_of=gms", "evaluate.best_of=gms is not a data set of [evaluate.data] (sums, gsm)"),
        ("evaluate.data.gsm.pth=y", "unknown key 'evaluate.data.gsm.pth'. Did you mean 'path'?"),
        ("evaluate.data.sums.path=y", "is not a key of the chosen evaluate.data.sums.type"),
        ("evaluate.data.sums.type=mth", 'evaluate.data.sums.type = "mth" is not one of'),
        ("evaluate.data.sums.type=math", "evaluate.data.sums.path is required"),
        ("evaluate.data.sums=3", "evaluate.data.sums = 3 does not fit"),
        ("evaluate.data=3", "Write [evaluate.data.NAME]"),
        ("evaluate.data.sums.terms=1", "evaluate.data.sums.terms = 1 must be at least 2"),
        ("evaluate.top_p=0", "evaluate.top_p = 0 must be above 0"),
        ("evaluate.evry=2", "Did you mean 'evaluate.every'?"),
    ],
)
def test_a_wrong_value_is_answered_with_the_fix(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, (override,))
    assert message in str(caught.value)


def test_the_name_of_a_data_set_is_part_of_metric_names() -> None:
    with pytest.raises(ValueError, match="letters, digits, - and _ only"):
        RunConfig.model_validate({"evaluate": {"data": {"a/b": {"type": "arithmetic"}}}})
