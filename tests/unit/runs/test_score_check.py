"""Both sides score one prompt, which detects weights that are held but not used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from betterhalf.batches import MicroBatch
from betterhalf.config.schema import PrecisionConfig, RunConfig
from betterhalf.errors import WeightSyncError
from betterhalf.precision.roles import build_precision
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.score_check import check_scores, fixed_tokens, score_difference, tolerance
from betterhalf.runs.weight_sync import sync_weights
from betterhalf.training.trainer import TokenScores


@pytest.fixture(params=["fp16", "bf16", "fp32"])
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    config = {"precision": {"preset": request.param}, "sampling": {"temperature": 0.5}, "logging": {"console": "quiet"}}
    made = assemble(RunConfig.model_validate(config))
    sync_weights(made)
    yield made
    made.close()


def test_rounding_stays_within_a_third_of_the_tolerance(parts: Parts) -> None:
    difference, mean_logprob = score_difference(parts.trainer, parts.engine, parts.model)
    assert 0 < difference < tolerance(parts.precision, mean_logprob) / 3


def test_an_engine_that_computes_with_other_weights_is_refused(parts: Parts) -> None:
    stale = [(name, torch.zeros_like(w) if "lm_head" in name else w) for name, w in parts.trainer.weight_stream()]
    parts.engine.load_weights(stale, policy_version=1)
    with pytest.raises(WeightSyncError, match="stale copies or a stale cache"):
        check_scores(parts.trainer, parts.engine, parts.model, parts.precision)


def test_a_logprob_that_is_not_finite_is_refused(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.engine, "score", lambda sequences: [(float("nan"),) * (len(sequences[0]) - 1)])
    with pytest.raises(WeightSyncError):
        check_scores(parts.trainer, parts.engine, parts.model, parts.precision)


def test_a_trainer_that_is_not_finite_is_left_to_the_step(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(packs: list[MicroBatch], temperature: float) -> list[TokenScores]:
        nan_C = torch.full((packs[0].num_tokens - 1,), float("nan"))
        return [TokenScores(logprobs_C=nan_C, entropies_C=nan_C)]

    monkeypatch.setattr(parts.trainer, "measure", measure)
    check_scores(parts.trainer, parts.engine, parts.model, parts.precision)


@pytest.mark.parametrize(
    ("trainer", "rollout", "mean", "expected"),
    [
        ("fp16", "fp16", -3.0, 64 * 2**-11),
        ("fp16", "fp16", -10.0, 160 * 2**-11),
        ("fp32", "fp32", -10.0, 1e-3),
        ("fp32", "bf16", -3.0, 64 * 2**-8),
    ],
)
def test_the_tolerance_is_that_of_the_coarser_format(trainer: str, rollout: str, mean: float, expected: float) -> None:
    config = PrecisionConfig.model_validate({"compute_dtype": trainer, "rollout_dtype": rollout})
    assert tolerance(build_precision(config, torch.device("cpu")), mean) == expected


def test_the_prompt_is_the_same_every_time_and_scattered() -> None:
    tokens = fixed_tokens(49152, 32)
    assert tokens == fixed_tokens(49152, 32)
    assert len(set(tokens)) == 32 and max(tokens) > 30000
    assert all(0 <= token < 16 for token in fixed_tokens(16, 32))
