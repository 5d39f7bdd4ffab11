"""Changing one choice of a preset, in files, through `extends` and on the command line, keeps the rest."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.algorithm import own_choices
from betterhalf.config.load import config_difference, load_config, resolved_json
from betterhalf.config.overrides import expand
from betterhalf.config.presets import PRESETS, Preset
from betterhalf.config.render import toml_text
from betterhalf.config.schema import AlgorithmConfig, RatioConfig, RunConfig
from betterhalf.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def changes(*overrides: str, preset: str) -> dict[str, Any]:
    """Resolved keys and values of a preset that overrides change."""
    plain, changed = load_config(None, [f"algorithm={preset}"]), load_config(None, [f"algorithm={preset}", *overrides])
    return {change.key.removeprefix("algorithm."): change.right for change in config_difference(plain, changed)}


@pytest.mark.parametrize(
    ("preset", "override", "expected"),
    [
        ("grpo", "surrogate.upper=1.2", {"surrogate.upper": 1.2}),
        ("grpo", "surrogate.lower=0.7", {"surrogate.lower": 0.7}),
        ("grpo", "surrogate.dual_clip=3", {"surrogate.dual_clip": 3.0}),
        ("dapo", "surrogate.dual_clip=3", {"surrogate.dual_clip": 3.0}),
        ("dapo", "surrogate.dual_clip=none", {"surrogate.dual_clip": None}),
        ("dppo_tv", "surrogate.probability_gap=0.1", {"surrogate.probability_gap": 0.1}),
        ("cispo", "surrogate.gradient=ratio", {"surrogate.gradient": "ratio"}),
        ("gspo", "surrogate.level=sequence", {"surrogate.level": "sequence"}),
        ("pg_seq_tis", "surrogate.ratio=current/proximal", {"surrogate.ratio": "current/proximal"}),
        ("icepop", "correction.upper=2", {"correction.upper": 2.0}),
        ("icepop", "correction.lower=none", {"correction.lower": None}),
        ("icepop", "correction.keep_weight=false", {"correction.keep_weight": False}),
        ("grpo_seq_tis", "correction.level=token", {"correction.level": "token"}),
        ("dapo", "overlong_factor=1", {"overlong_factor": 1.0}),
    ],
)
def test_one_choice_changes_alone(preset: str, override: str, expected: dict[str, Any]) -> None:
    assert changes(f"algorithm.{override}", preset=preset) == expected


BOUNDS = ("lower", "upper", "dual_clip", "probability_gap")


def numbers_of_presets() -> Iterator[tuple[str, str, float]]:
    """Yield (preset, key below `algorithm`, another value) for every number of every preset."""
    for preset, row in PRESETS.items():
        for ratio in ("surrogate", "correction"):
            own = getattr(row, ratio)
            for name in BOUNDS:
                if (value := getattr(own, name)) is not None:
                    yield preset, f"{ratio}.{name}", value * (0.99 if value < 1 else 1.01)
        yield from ((preset, "max_sampling_rounds", 5), (preset, "length_penalty", 0.1))
        yield preset, "overlong_buffer", 3
        if row.overlong_buffer is None:
            yield preset, "overlong_factor", 0.7


@pytest.mark.parametrize(("preset", "key", "value"), list(numbers_of_presets()))
def test_every_number_of_every_preset_changes_alone(tmp_path: Path, preset: str, key: str, value: float) -> None:
    assert changes(f"algorithm.{key}={value!r}", preset=preset) == {key: value}
    table = f"[algorithm]\npreset = '{preset}'\n{key} = {value!r}\n"
    config = load_config(write(tmp_path, "one.toml", table))
    assert config.algorithm == load_config(None, [f"algorithm={preset}", f"algorithm.{key}={value!r}"]).algorithm
    resolved = resolve_algorithm(config.algorithm)
    first, *rest = key.split(".")
    assert (getattr(getattr(resolved, first), rest[0]) if rest else getattr(resolved, first)) == value


def test_there_are_as_many_numbers_as_the_presets_have() -> None:
    counts = Counter(key.split(".")[0] for _, key, _ in numbers_of_presets())
    assert (counts["surrogate"], counts["correction"]) == (24, 7)
    assert {key for _, key, _ in numbers_of_presets()} >= {"surrogate.dual_clip", "surrogate.probability_gap"}


def test_another_treatment_leaves_the_bounds_of_the_old_one_behind() -> None:
    found = changes("algorithm.surrogate.treatment=truncate", "algorithm.surrogate.upper=5", preset="dapo")
    expected = {"treatment": "truncate", "lower": None, "upper": 5.0, "dual_clip": None}
    assert found == {f"surrogate.{key}": value for key, value in expected.items()}


def test_switching_a_ratio_off_or_on_keeps_nothing_of_the_preset() -> None:
    assert load_config(None, ["algorithm=icepop", "algorithm.correction=none"]).algorithm.correction == RatioConfig(
        level="none", gradient="logprob"
    )
    given = ["algorithm=reinforce", "algorithm.surrogate=token"]
    assert load_config(None, given).algorithm.surrogate == RatioConfig(level="token")


def test_given_values_apply_to_the_preset_named_last_in_whichever_file(tmp_path: Path) -> None:
    base = "[algorithm]\npreset = 'icepop'\n[algorithm.correction]\nupper = 4\n[algorithm.surrogate]\nlower = 0.7\n"
    write(tmp_path, "base.toml", base)
    path = write(tmp_path, "child.toml", "extends = 'base.toml'\nalgorithm = 'grpo_seq_tis'\n")
    expected = AlgorithmConfig.model_validate(
        {"preset": "grpo_seq_tis", "correction": {"upper": 4}, "surrogate": {"lower": 0.7}}
    )
    assert load_config(path).algorithm == expected
    assert (expected.correction.treatment, expected.correction.lower) == ("truncate", None)
    assert load_config(path, ["algorithm=icepop"]).algorithm == load_config(tmp_path / "base.toml").algorithm
    assert load_config(path, ["algorithm.correction.upper=2"]).algorithm.correction.upper == 2


def test_a_value_that_the_first_preset_has_too_is_still_given(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[algorithm]\npreset = 'icepop'\n[algorithm.correction]\nupper = 5\n")
    path = write(tmp_path, "child.toml", "extends = 'base.toml'\nalgorithm = 'grpo_seq_tis'\n")
    assert load_config(path).algorithm.correction.upper == 5


def test_a_run_as_the_experiment_takes_another_preset_with_its_own_choices_kept(tmp_path: Path) -> None:
    config = load_config(None, ["algorithm=icepop", "algorithm.correction.upper=4", "algorithm.advantage=raw"])
    write(tmp_path, "config.json", json.dumps(resolved_json(config)))
    assert load_config(tmp_path).algorithm == config.algorithm
    switched = load_config(tmp_path, ["algorithm=grpo_seq_tis"]).algorithm
    assert switched == AlgorithmConfig.model_validate(
        {"preset": "grpo_seq_tis", "correction": {"upper": 4}, "advantage": "raw"}
    )


def test_a_config_json_without_the_presets_choices_means_the_same(tmp_path: Path) -> None:
    resolved = resolved_json(load_config(None, ["algorithm=dapo"]))
    absent = {field.name: None for field in fields(Preset)}
    write(tmp_path, "config.json", json.dumps({**resolved, "algorithm": {**resolved["algorithm"], **absent}}))
    assert config_difference(load_config(tmp_path), load_config(None, ["algorithm=dapo"])) == []


@pytest.mark.parametrize("preset", ["grpo", "pg_seq_mis", "cispo"])
def test_a_config_json_of_an_earlier_run_means_the_same(tmp_path: Path, preset: str) -> None:
    """It may call the gradient through log pi "score"."""
    config = load_config(None, [f"algorithm={preset}"])
    text = json.dumps(resolved_json(config))
    write(tmp_path, "config.json", text.replace('"gradient": "logprob"', '"gradient": "score"'))
    assert '"score"' in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert load_config(tmp_path) == config


def test_a_config_json_of_an_earlier_run_with_adapters_on_all_layers_means_the_same(tmp_path: Path) -> None:
    """It lists no target."""
    config = load_config(None, ["lora.rank=4"])
    text = json.dumps(resolved_json(config))
    write(tmp_path, "config.json", text.replace('["all-linear"]', "[]"))
    assert '"target_modules": []' in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert load_config(tmp_path) == config


def test_an_old_name_of_a_value_is_answered_with_the_current_one() -> None:
    with pytest.raises(ConfigError, match=r'gradient = "score" is not one of ratio, logprob. Did you mean logprob\?'):
        load_config(None, ["algorithm=cispo", "algorithm.surrogate.gradient=score"])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_configuration_shows_every_choice_of_the_preset(preset: str) -> None:
    section = resolved_json(load_config(None, [f"algorithm={preset}"]))["algorithm"]
    row = PRESETS[preset]  # type: ignore[index]
    assert section["surrogate"] == row.surrogate.model_dump()
    assert section["correction"] == row.correction.model_dump()
    assert (section["advantage"], section["aggregation"]) == (row.advantage, row.aggregation)
    assert own_choices(section).keys().isdisjoint(field.name for field in fields(Preset))


values = {
    "level": st.sampled_from(["none", "token", "sequence", "geometric_mean"]),
    "ratio": st.sampled_from(["current/proximal", "proximal/behavior"]),
    "treatment": st.sampled_from(["raw", "truncate", "mask", "clip"]),
    "lower": st.none() | st.sampled_from([0.5, 0.8]),
    "upper": st.none() | st.sampled_from([1.28, 3.0, 5.0]),
    "keep_weight": st.booleans(),
    "dual_clip": st.none() | st.just(10.0),
}
sparse = st.fixed_dictionaries({}, optional=values)


@given(preset=st.sampled_from(sorted(PRESETS)), surrogate=sparse, correction=sparse)
def test_every_way_to_save_a_configuration_restores_it(preset: str, surrogate: Any, correction: Any) -> None:
    section = {"preset": preset, "surrogate": surrogate, "correction": correction}
    config = RunConfig.model_validate({"algorithm": section})
    resolved = resolved_json(config)
    assert RunConfig.model_validate(resolved) == config
    assert AlgorithmConfig.model_validate(own_choices(resolved["algorithm"])) == config.algorithm
    assert RunConfig.model_validate(expand(tomllib.loads(toml_text(config)))) == config


def test_a_resumed_run_is_compared_by_resolved_choices(tmp_path: Path) -> None:
    write(tmp_path, "config.json", json.dumps(resolved_json(load_config(None))))
    same = load_config(None, ["algorithm.surrogate.upper=1.28", "algorithm.correction=none"])
    assert config_difference(load_config(tmp_path), same) == []
    (change,) = config_difference(load_config(tmp_path), load_config(None, ["algorithm.surrogate.upper=1.2"]))
    assert str(change) == "algorithm.surrogate.upper: 1.28 -> 1.2"
