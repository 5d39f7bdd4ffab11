"""Score Centering equals the formula of arXiv 2609.20807, written out over the vocabulary in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from betterhalf.algorithms.loss_stats import policy_metrics
from betterhalf.algorithms.policy_loss import LossOutput, policy_loss
from betterhalf.algorithms.presets import PRESETS, Algorithm, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs
from betterhalf.config.schema import AlgorithmConfig
from betterhalf.errors import ConfigError

VOCABULARY, TOKENS = 7, 6
SCORE = {"level": "token", "ratio": "current/behavior", "gradient": "logprob"}
Weight = Callable[[float], float]
CASES: dict[str, tuple[dict[str, Any], Weight]] = {
    "no ratio": ({"preset": "rloo"}, lambda ratio: 1.0),
    "truncated": ({"surrogate": {**SCORE, "treatment": "truncate", "upper": 1.2}}, lambda ratio: min(ratio, 1.2)),
    "masked": (
        {"surrogate": {**SCORE, "treatment": "mask", "lower": 0.8, "upper": 1.25}},
        lambda ratio: ratio if 0.8 <= ratio <= 1.25 else 0.0,
    ),
    "masked, without the weight": (
        {"surrogate": {**SCORE, "treatment": "mask", "upper": 1.25, "keep_weight": False}},
        lambda ratio: 1.0 if ratio <= 1.25 else 0.0,
    ),
}


def algorithm(choices: dict[str, Any], top: int) -> Algorithm:
    return resolve_algorithm(AlgorithmConfig.model_validate({**choices, "score_centering": top}))


def logits() -> tuple[Tensor, Tensor]:
    """Return logits of trainer (a leaf) and engine, float64 [C, V]: the same up to a mismatch."""
    generator = torch.Generator().manual_seed(3)
    trainer = torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64) * 2
    engine = trainer + 0.3 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    return trainer.requires_grad_(), engine


def loss_of(of: Algorithm, trainer: Tensor, engine: Tensor, sampled_C: Tensor, top: int) -> LossOutput:
    """Return the loss of tokens of two sequences with the advantages 1.5 and -0.5, each with a share of 1 / 40."""
    log_pi, log_mu = trainer.log_softmax(-1), engine.log_softmax(-1)
    behavior_top, ids = log_mu.topk(top, dim=-1)
    chosen = sampled_C.unsqueeze(-1)
    inputs = LossInputs(
        current_logprobs_C=log_pi.gather(-1, chosen).squeeze(-1),
        behavior_logprobs_C=log_mu.gather(-1, chosen).squeeze(-1),
        current_top_logprobs_CK=log_pi.gather(-1, ids),
        behavior_top_logprobs_CK=behavior_top,
        advantages_S=torch.tensor([1.5, -0.5], dtype=torch.float64),
        sequence_index_C=torch.tensor([0, 0, 0, 0, 1, 1]),
    )
    return policy_loss(of, inputs, Denominators(sequences=2.0, tokens=6.0, max_tokens=20))


def by_the_formula(trainer: Tensor, engine: Tensor, sampled: list[int], top: int, weight: Weight) -> Tensor:
    """Return the gradient with respect to the trainer's logits: -A (f(r_y) score_y - sum_v mu_v f(r_v) score_v) / 40.

    Outside of the `top` most likely tokens, mu is replaced by pi, scaled to the same total.
    """
    rows = []
    for place, (pi, mu) in enumerate(zip(trainer.softmax(-1).tolist(), engine.softmax(-1).tolist(), strict=True)):
        head = sorted(range(VOCABULARY), key=lambda v: -mu[v])[:top]
        rest = 1 - math.fsum(pi[v] for v in head)
        rho = (1 - math.fsum(mu[v] for v in head)) / rest if top < VOCABULARY else 1.0
        known = [mu[v] if v in head else rho * pi[v] for v in range(VOCABULARY)]
        scores = [[float(u == v) - pi[u] for u in range(VOCABULARY)] for v in range(VOCABULARY)]
        y, advantage = sampled[place], 1.5 if place < 4 else -0.5
        rows.append(
            [
                -advantage
                * (
                    weight(pi[y] / mu[y]) * scores[y][u]
                    - math.fsum(known[v] * weight(pi[v] / known[v]) * scores[v][u] for v in range(VOCABULARY))
                )
                / 40
                for u in range(VOCABULARY)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("top", [1, 3, 6, 7])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_formula(case: str, top: int) -> None:
    choices, weight = CASES[case]
    trainer, engine = logits()
    sampled = [0, 6, 3, 2, 5, 1]
    output = loss_of(algorithm(choices, top), trainer, engine, torch.tensor(sampled), top)
    (gradient,) = torch.autograd.grad(output.loss, trainer)
    expected = by_the_formula(trainer.detach(), engine, sampled, top, weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_the_mean_gradient_over_what_the_engine_samples_is_zero_at_a_constant_advantage(case: str) -> None:
    choices, _ = CASES[case]
    trainer, engine = logits()
    with_it, without = torch.zeros_like(trainer), torch.zeros_like(trainer)
    for token in range(VOCABULARY):
        sampled = torch.full((TOKENS,), token)
        for total, of in ((with_it, algorithm(choices, VOCABULARY)), (without, algorithm(choices, 0))):
            (gradient,) = torch.autograd.grad(loss_of(of, trainer, engine, sampled, VOCABULARY).loss, trainer)
            total += engine.softmax(-1)[:, token : token + 1] * gradient
    assert with_it.abs().max() < 1e-15
    assert without.abs().max() > 1e-4


def test_without_a_mismatch_the_term_is_zero() -> None:
    trainer, _ = logits()
    sampled = torch.tensor([0, 6, 3, 2, 5, 1])
    for choices, _ in CASES.values():
        plain, centred = (
            torch.autograd.grad(loss_of(algorithm(choices, top), trainer, trainer.detach(), sampled, 3).loss, trainer)
            for top in (0, 3)
        )
        torch.testing.assert_close(plain, centred, rtol=0, atol=1e-17)


def test_metrics_by_hand() -> None:
    trainer = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64).log().repeat(TOKENS, 1).requires_grad_()
    engine = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().repeat(TOKENS, 1)
    output = loss_of(algorithm({"preset": "rloo"}, 2), trainer, engine, torch.zeros(TOKENS, dtype=torch.int64), 2)
    metrics = policy_metrics(output.stats)
    # tails of 0.2 both: coefficients 0.5 - 0.4 and 0.3 - 0.4
    assert metrics["loss/score_centering/coefficients"] == pytest.approx(0.2)
    assert metrics["loss/score_centering/tail"] == pytest.approx(0.2)
    assert metrics["policy/clip_fraction"] == 0.0


def test_a_tail_that_is_rounding_noise_counts_as_equal_on_both_sides() -> None:
    """One minus a sum near one is noise in FP32; the floor of both tails makes their quotient 1."""
    trainer, engine = (values.detach().float() for values in logits())
    output = loss_of(algorithm({"preset": "rloo"}, 7), trainer.requires_grad_(), engine, torch.tensor([0] * 6), 7)
    (gradient,) = torch.autograd.grad(output.loss, trainer)
    expected = by_the_formula(trainer.detach().double(), engine.double(), [0] * 6, 7, lambda ratio: 1.0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)


REFUSED: dict[str, list[dict[str, Any]]] = {
    "needs a surrogate that multiplies the score of each token by a constant": [
        {"preset": "grpo"},
        {"preset": "gspo"},
        {"preset": "cispo"},
        {"preset": "dppo_tv"},
        {"preset": "pg_seq_tis"},
    ],
    "centres one ratio, current/behavior": [{"preset": "icepop"}],
    "has no effect: the score is centred already": [
        {"surrogate": {**SCORE, "treatment": "raw", "lower": None, "upper": None}}
    ],
}


@pytest.mark.parametrize(("message", "choices"), [(m, c) for m, cases in REFUSED.items() for c in cases])
def test_a_loss_that_cannot_be_centred_is_refused(message: str, choices: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.score_centering {message}"):
        algorithm(choices, 8)


def test_missing_logprobs_of_the_most_likely_tokens_are_an_error() -> None:
    trainer, engine = logits()
    of = replace(PRESETS["rloo"], score_centering=3)
    inputs = LossInputs(
        current_logprobs_C=trainer[:, 0],
        behavior_logprobs_C=engine[:, 0],
        advantages_S=torch.ones(1),
        sequence_index_C=torch.zeros(TOKENS, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match="most likely tokens"):
        policy_loss(of, inputs, Denominators(sequences=1.0, tokens=6.0, max_tokens=20))
