"""The table of presets equals the documented one, and contradictory choices are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from betterhalf.algorithms.presets import PRESETS, resolve_algorithm
from betterhalf.config.schema import AlgorithmConfig, RatioConfig
from betterhalf.errors import ConfigError
from betterhalf.types import PresetName

ROOT = Path(__file__).parents[3]


def test_every_preset_name_has_a_row_that_resolves_to_itself() -> None:
    assert tuple(PRESETS) == get_args(PresetName)
    for name, algorithm in PRESETS.items():
        assert resolve_algorithm(AlgorithmConfig(preset=name)) == algorithm


def test_every_preset_is_documented() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in page] == []


def test_presets_that_read_the_anchor_say_so() -> None:
    # As in the paper, PG needs no pass before the update; nor do ratios to the behavior policy, or none.
    without = {name for name, algorithm in PRESETS.items() if not algorithm.needs_proximal}
    assert without == {"pg_seq_is", "pg_seq_tis", "pg_seq_mis", "reinforce", "rloo", "dppo_tv"}
    assert resolve_algorithm(AlgorithmConfig(preset="pg_seq_mis", denominator="kept")).needs_proximal


def test_a_given_choice_replaces_the_presets_own_and_nothing_else() -> None:
    base = PRESETS["grpo_token_tis"]
    changed = resolve_algorithm(AlgorithmConfig(preset="grpo_token_tis", aggregation="token_mean"))
    assert changed.aggregation == "token_mean"
    assert (changed.advantage, changed.surrogate, changed.correction) == (
        base.advantage,
        base.surrogate,
        base.correction,
    )
    off = resolve_algorithm(AlgorithmConfig(preset="grpo_token_tis", correction=RatioConfig(level="none")))
    assert off.correction.level == "none" and off.surrogate == PRESETS["grpo"].surrogate
    assert not resolve_algorithm(AlgorithmConfig(preset="dapo", dynamic_sampling=False)).dynamic_sampling


def test_overlong_buffer_of_dapo_is_a_fifth_of_the_limit_unless_given() -> None:
    assert PRESETS["dapo"].overlong_tokens(20480) == 4096
    assert PRESETS["grpo"].overlong_tokens(20480) == 0
    assert resolve_algorithm(AlgorithmConfig(preset="dapo", overlong_buffer=10)).overlong_tokens(20480) == 10
    assert resolve_algorithm(AlgorithmConfig(preset="dapo", overlong_buffer=0)).overlong_tokens(20480) == 0


SURROGATES: list[tuple[dict[str, Any], str]] = [
    ({"ratio": "proximal/behavior"}, "does not depend on the weights"),
    ({"treatment": "clip", "lower": 0.8, "upper": 1.2, "gradient": "logprob"}, "carries no gradient"),
    ({"treatment": "mask", "upper": 3, "keep_weight": False}, "weight that carries the gradient"),
    ({"gradient": "logprob", "probability_gap": 0.2}, "compares probabilities"),
    ({"treatment": "truncate", "upper": -1}, "not positive"),
    ({"treatment": "mask", "lower": 3, "upper": 2}, "lower above upper"),
    ({"upper": 2}, "treatment raw does not use them"),
    ({"treatment": "truncate"}, "truncates without an upper bound"),
    ({"treatment": "truncate", "lower": 0.5, "upper": 2}, "takes no lower bound"),
    ({"treatment": "mask"}, "without a bound"),
    ({"treatment": "clip", "upper": 1.2}, "clips without two bounds"),
    ({"treatment": "clip", "lower": 0.2, "upper": 0.28}, "bounds for clip that do not include 1"),
    ({"keep_weight": False, "gradient": "logprob"}, "without masking"),
    ({"treatment": "clip", "lower": 0.8, "upper": 1.2, "dual_clip": 0.5}, "must exceed 1"),
    ({"treatment": "truncate", "upper": 3, "dual_clip": 3}, "needs treatment clip"),
    (
        {"ratio": "current/behavior", "treatment": "clip", "lower": 0.8, "upper": 1.2, "probability_gap": 0.2},
        "two trust regions",
    ),
]


@pytest.mark.parametrize(("choices", "message"), SURROGATES)
def test_contradictory_surrogates_are_refused_with_a_fix(choices: dict[str, Any], message: str) -> None:
    surrogate = RatioConfig(level="token", **choices)
    with pytest.raises(ConfigError, match=f"^algorithm.surrogate .*{message}.*; .*\\.$"):
        resolve_algorithm(AlgorithmConfig(surrogate=surrogate))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"treatment": "truncate", "upper": 3}, "another ratio than proximal/behavior"),
        ({"ratio": "proximal/behavior", "treatment": "clip", "lower": 0.8, "upper": 1.2}, "has treatment clip"),
        ({"ratio": "proximal/behavior", "probability_gap": 0.2}, "needs the current policy"),
    ],
)
def test_contradictory_corrections_are_refused_with_a_fix(choices: dict[str, Any], message: str) -> None:
    correction = RatioConfig(level="token", **choices)
    with pytest.raises(ConfigError, match=f"^algorithm.correction .*{message}.*; .*\\.$"):
        resolve_algorithm(AlgorithmConfig(correction=correction))


def test_correcting_twice_for_the_mismatch_is_refused() -> None:
    correction = RatioConfig(level="token", ratio="proximal/behavior", treatment="truncate", upper=3)
    with pytest.raises(ConfigError, match="count the mismatch twice"):
        resolve_algorithm(AlgorithmConfig(preset="pg_seq_is", correction=correction))


def test_an_overlong_factor_without_a_buffer_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlong_factor=1 has no effect, because algorithm.overlong_buffer is 0"):
        resolve_algorithm(AlgorithmConfig(overlong_factor=1.0))
    assert resolve_algorithm(AlgorithmConfig(overlong_factor=1.0, overlong_buffer=5)).overlong_factor == 1.0


def test_negative_overlong_buffer_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlong_buffer=-1 is negative"):
        resolve_algorithm(AlgorithmConfig(overlong_buffer=-1))
