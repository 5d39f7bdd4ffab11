"""Training with top-p, top-k and min-p: the trainer scores the distribution that the engine sampled from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineError
from betterhalf.rollout.native import slots
from betterhalf.run_dir import read_jsonl
from betterhalf.runs.train import train

Configured = Callable[..., RunConfig]

HOT = {"max_tokens": 40, "temperature": 1.5}
"""Hot sampling, so that the demo model's distributions are worth truncating."""
TRUNCATIONS: dict[str, dict[str, float]] = {
    "whole": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.05},
    "all three": {"top_p": 0.95, "top_k": 6, "min_p": 0.01},
}


@pytest.fixture
def rows(small_config: Configured, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Train a few steps with some sampling settings, and return the rows of metrics."""

    def run(name: str, sampling: dict[str, float], **changes: Any) -> list[dict[str, Any]]:
        config = small_config(sampling={**HOT, **sampling}, seed=2, **changes)
        train(config, str(tmp_path / name), resume=False)
        return read_jsonl(tmp_path / name / "metrics.jsonl")

    return run


def test_the_mismatch_stays_that_of_the_whole_distribution(
    rows: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Scored over the whole vocabulary, each log_ratio would be the log of the mass that was kept."""
    found = {name: rows(name, settings) for name, settings in TRUNCATIONS.items()}
    whole = [row["mismatch/k3/mean"] for row in found["whole"]]
    assert not any(name.startswith("rollout/support") for row in found["whole"] for name in row)
    for name in TRUNCATIONS.keys() - {"whole"}:
        assert [row["optim/updates_applied"] for row in found[name]] == [2, 2]
        for row in found[name]:
            assert 0 < row["mismatch/k3/mean"] < 10 * max(whole)
            assert row["mismatch/pearson"] > 0.999
            assert 1 < row["rollout/support/tokens/mean"] <= row["rollout/support/tokens/max"] <= 16
            assert 0.8 < row["rollout/support/mass/mean"] < 1
            assert math.isfinite(row["policy/loss"]) and row["optim/grad_norm"] > 0
            assert 0 < row["policy/entropy/mean"] < found["whole"][0]["policy/entropy/mean"]
        sample = read_jsonl(tmp_path / name / "rollouts.jsonl")[0]
        assert len(sample["support_sizes"]) == len(sample["token_ids"])
    assert max(row["rollout/support/tokens/max"] for row in found["top_k"]) == 3
    assert read_jsonl(tmp_path / "whole" / "rollouts.jsonl")[0]["support_sizes"] is None


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_exact_rounding_leaves_no_mismatch(rows: Callable[..., list[dict[str, Any]]], precision: str) -> None:
    found = rows("run", {"top_p": 0.9}, precision={"preset": precision}, engine={"rounding": "exact"})
    assert [row["mismatch/log_ratio/max_abs"] for row in found] == [0.0, 0.0]
    assert min(row["rollout/support/mass/mean"] for row in found) < 0.99
    assert min(row["optim/grad_norm"] for row in found) > 0


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-300}, {"min_p": 1.0}], ids=str)
def test_one_token_at_each_position_teaches_nothing(
    settings: dict[str, float], rows: Callable[..., list[dict[str, Any]]]
) -> None:
    for row in rows("run", settings):
        assert row["rollout/support/tokens/max"] == 1
        assert row["policy/entropy/mean"] == row["mismatch/log_ratio/max_abs"] == row["optim/grad_norm"] == 0


def test_an_engine_that_forgets_the_support_ends_the_run(
    rows: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slots.Completion
    monkeypatch.setattr(slots, "Completion", lambda **fields: whole(**{**fields, "support": None}))
    with pytest.raises(EngineError, match="the tokens that truncation kept for 0 of them"):
        rows("run", {"top_k": 3})
