"""Settings of the command line, before the schema sees them."""

from __future__ import annotations

import pytest

from betterhalf.config import keys
from betterhalf.config.overrides import expand, parse_overrides, split_overrides
from betterhalf.errors import ConfigError


def test_run_dir_is_taken_out_and_the_last_one_counts() -> None:
    assert split_overrides(["seed=1", "run_dir=a", "run_dir=b c", "x=2"]) == ("b c", ["seed=1", "x=2"])
    assert split_overrides([]) == (None, [])


@pytest.mark.parametrize("argument", ["run_dir=", "seed", "=3", "--seed=1"])
def test_an_argument_that_is_not_a_setting_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="Write"):
        split_overrides([argument])


def test_dotted_keys_become_nested() -> None:
    assert parse_overrides(["precision.loss_scale.floor=2", "unknown.key=[1, 2]"]) == [
        {"precision": {"loss_scale": {"floor": 2}}},
        {"unknown": {"key": [1, 2]}},
    ]


def test_shorthands_expand_where_the_schema_has_them() -> None:
    layer = {"precision": "bf16", "task": "math", "seed": 3, "unknown": "x", "evaluate": {"max_prompts": "none"}}
    assert expand(layer) == {
        "precision": {"preset": "bf16"},
        "task": {"type": "math"},
        "seed": 3,
        "unknown": "x",
        "evaluate": {"max_prompts": None},
    }


def test_a_key_misspelt_in_its_section_leads_back_to_it() -> None:
    for key in keys.all_keys():
        assert keys.find(key.split(".")) is not None
        assert keys.nearest_key(f"{key[:-1]}{key[-1] * 2}") == key


def test_every_field_is_documented() -> None:
    undocumented = [key for key in keys.all_keys() if not key.endswith("type") and not _description(key)]
    assert undocumented == []


def _description(key: str) -> str | None:
    info = keys.find(key.split("."))
    return info.description if info else None
