"""Loss and gradient of every preset equal formulas written out by hand, token by token, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from betterhalf.algorithms.loss_stats import policy_metrics
from betterhalf.algorithms.policy_loss import LossOutput, policy_loss
from betterhalf.algorithms.presets import PRESETS, Algorithm
from betterhalf.batches import Denominators, LossInputs
from betterhalf.reduction import declared_reductions

MAX_TOKENS = 8
Token = tuple[float, float, float]
"""Logprobs (current, proximal, behavior) of one token."""
TokenLoss = tuple[float, float]
"""(value, derivative with respect to the current logprob)."""


# -- the reference: one function for each preset, from a sequence and its advantage to its token losses


def exp20(x: float) -> float:
    return math.exp(min(max(x, -20.0), 20.0))


def clipped(log_ratio: float, advantage: float, lower: float, upper: float, dual: float = math.inf) -> TokenLoss:
    """-min(r A, clip(r) A), at most -dual A for A < 0; constant where clipped, or where the exponent was bounded."""
    r = exp20(log_ratio)
    if advantage > 0 and r > upper:
        return -advantage * upper, 0.0
    if advantage < 0 and r < lower:
        return -advantage * lower, 0.0
    if advantage < 0 and r > dual:
        return -advantage * dual, 0.0
    return -advantage * r, (-advantage * r if abs(log_ratio) <= 20 else 0.0)


def scaled(losses: list[TokenLoss], weights: Sequence[float]) -> list[TokenLoss]:
    return [(value * w, slope * w) for (value, slope), w in zip(losses, weights, strict=True)]


def grpo(tokens: list[Token], a: float) -> list[TokenLoss]:
    return [clipped(current - proximal, a, 0.8, 1.28) for current, proximal, _ in tokens]


def grpo_token_tis(tokens: list[Token], a: float) -> list[TokenLoss]:
    return scaled(grpo(tokens, a), [min(exp20(p - b), 3.0) for _, p, b in tokens])


def grpo_seq_tis(tokens: list[Token], a: float) -> list[TokenLoss]:
    rho = exp20(sum(p - b for _, p, b in tokens))
    return scaled(grpo(tokens, a), [min(rho, 3.0)] * len(tokens))


def grpo_seq_mis(tokens: list[Token], a: float) -> list[TokenLoss]:
    rho = exp20(sum(p - b for _, p, b in tokens))
    return scaled(grpo(tokens, a), [rho if rho <= 3 else 0.0] * len(tokens))


def gspo(tokens: list[Token], a: float) -> list[TokenLoss]:
    mean = sum(c - p for c, p, _ in tokens) / len(tokens)
    return [clipped(mean, a, 1 - 3e-4, 1 + 4e-4)] * len(tokens)


def score(tokens: list[Token], a: float, weights: Sequence[float]) -> list[TokenLoss]:
    return [(-w * a * current, -w * a) for (current, _, _), w in zip(tokens, weights, strict=True)]


def pg_seq_is(tokens: list[Token], a: float) -> list[TokenLoss]:
    return score(tokens, a, [exp20(sum(c - b for c, _, b in tokens))] * len(tokens))


def pg_seq_tis(tokens: list[Token], a: float) -> list[TokenLoss]:
    return score(tokens, a, [min(exp20(sum(c - b for c, _, b in tokens)), 3.0)] * len(tokens))


def pg_seq_mis(tokens: list[Token], a: float) -> list[TokenLoss]:
    w = exp20(sum(c - b for c, _, b in tokens))
    return score(tokens, a, [w if w <= 3 else 0.0] * len(tokens))


def reinforce(tokens: list[Token], a: float) -> list[TokenLoss]:
    return score(tokens, a, [1.0] * len(tokens))


def dapo(tokens: list[Token], a: float) -> list[TokenLoss]:
    return [clipped(current - proximal, a, 0.8, 1.28, dual=10.0) for current, proximal, _ in tokens]


def cispo(tokens: list[Token], a: float) -> list[TokenLoss]:
    return score(tokens, a, [min(exp20(c - p), 5.0) for c, p, _ in tokens])


def icepop(tokens: list[Token], a: float) -> list[TokenLoss]:
    rhos = [exp20(p - b) for _, p, b in tokens]
    return scaled(grpo(tokens, a), [rho if 0.5 <= rho <= 5 else 0.0 for rho in rhos])


def geo_mask(tokens: list[Token], a: float) -> list[TokenLoss]:
    mean = exp20(sum(p - b for _, p, b in tokens) / len(tokens))
    return scaled(grpo(tokens, a), [1.0 if 0.99 <= mean <= 1.01 else 0.0] * len(tokens))


def dppo_tv(tokens: list[Token], a: float) -> list[TokenLoss]:
    weights = []
    for current, _, behavior in tokens:
        pi, mu = math.exp(current), math.exp(behavior)
        leaves = abs(pi - mu) > 0.2 and ((a > 0 and pi > mu) or (a < 0 and pi < mu))
        weights.append(0.0 if leaves else min(exp20(current - behavior), 20.0))
    return score(tokens, a, weights)


REFERENCE: dict[str, tuple[Callable[[list[Token], float], list[TokenLoss]], str]] = {
    "grpo": (grpo, "constant_length"),
    "grpo_std": (grpo, "sequence_mean"),
    "grpo_token_tis": (grpo_token_tis, "constant_length"),
    "grpo_seq_tis": (grpo_seq_tis, "constant_length"),
    "grpo_seq_mis": (grpo_seq_mis, "constant_length"),
    "gspo": (gspo, "sequence_mean"),
    "pg_seq_is": (pg_seq_is, "constant_length"),
    "pg_seq_tis": (pg_seq_tis, "constant_length"),
    "pg_seq_mis": (pg_seq_mis, "constant_length"),
    "reinforce": (reinforce, "constant_length"),
    "rloo": (reinforce, "constant_length"),
    "dapo": (dapo, "token_mean"),
    "cispo": (cispo, "token_mean"),
    "icepop": (icepop, "constant_length"),
    "geo_mask": (geo_mask, "constant_length"),
    "dppo_tv": (dppo_tv, "token_mean"),
}


def reference(
    preset: str, sequences: list[list[Token]], advantages: list[float], of: Denominators
) -> tuple[float, list[float], float]:
    """Return the loss, its gradient for each token, and the sum of absolute token losses (the scale of rounding)."""
    formula, aggregation = REFERENCE[preset]
    loss, gradient, scale = 0.0, [], 0.0
    for tokens, advantage in zip(sequences, advantages, strict=True):
        share = {
            "constant_length": 1 / (of.max_tokens * of.sequences),
            "sequence_mean": 1 / (max(len(tokens), 1) * of.sequences),
            "token_mean": 1 / of.tokens,
        }[aggregation]
        for value, slope in formula(tokens, advantage) if tokens else []:
            loss, scale = loss + value * share, scale + abs(value * share)
            gradient.append(slope * share)
    return loss, gradient, scale


# -- the sequences


def near(*bounds: float) -> list[float]:
    """Return log-ratios just inside and just outside every bound, close to 0, and far outside."""
    edges = [math.log(bound) + side * 4e-6 for bound in bounds for side in (-1, 1)]
    return [0.0, *edges, -3.5, 3.5, -19.0, 19.0, -25.0, 25.0]


def single_tokens() -> tuple[list[list[Token]], list[float]]:
    """Return sequences of one token: every pair of drift and mismatch, with advantages of both signs and 0."""
    drifts = near(0.8, 1.28, 1 - 3e-4, 1 + 4e-4, 5, 10, 3, 20)
    mismatches = near(0.5, 3, 5, 0.99, 1.01)
    cases = list(product(drifts, mismatches, (1.0, -0.7, 0.0)))
    return [[(-1.2 + m + d, -1.2 + m, -1.2)] for d, m, _ in cases], [a for *_, a in cases]


def around_the_gap() -> tuple[list[list[Token]], list[float]]:
    """Return tokens with pi - mu of 0.2 -+ 1e-4 in both directions, and with a ratio just below and above 20."""
    pairs = [(0.5, 0.5 + g) for g in (-0.2001, -0.1999, 0.1999, 0.2001)] + [(0.004, 0.0799), (0.004, 0.0801)]
    cases = list(product(pairs, (1.0, -0.7)))
    return [[(math.log(pi), math.log(mu) + 0.01, math.log(mu))] for (mu, pi), _ in cases], [a for *_, a in cases]


def several_tokens() -> tuple[list[list[Token]], list[float]]:
    """Return random sequences of 0 to 8 tokens, whose products and means fall on both sides of every bound."""
    draw = torch.Generator().manual_seed(7)
    sequences, advantages = [], []
    for number in range(400):
        length = int(torch.randint(0, MAX_TOKENS + 1, (1,), generator=draw))
        drift, gap = (10.0 ** float(torch.empty(1).uniform_(-4, 0, generator=draw)) for _ in range(2))
        noise = torch.randn(length, 3, generator=draw, dtype=torch.float64)
        behavior = -noise[:, 0].abs() - 0.05
        proximal = behavior + gap * noise[:, 1]
        current = proximal + drift * noise[:, 2]
        sequences.append(list(zip(current.tolist(), proximal.tolist(), behavior.tolist(), strict=True)))
        advantages.append((1.5, -0.5, 0.0, 0.25)[number % 4])
    return sequences, advantages


CASES = {"one token": single_tokens, "probability gap": around_the_gap, "several tokens": several_tokens}


def rounded(sequences: list[list[Token]], dtype: torch.dtype) -> list[list[Token]]:
    """Round the logprobs to a dtype, so that only the arithmetic differs."""
    return [[tuple(torch.tensor(token, dtype=dtype).tolist()) for token in tokens] for tokens in sequences]


def run(
    algorithm: Algorithm,
    sequences: list[list[Token]],
    advantages: list[float],
    of: Denominators,
    dtype: torch.dtype = torch.float64,
) -> tuple[LossOutput, Tensor]:
    flat = [token for tokens in sequences for token in tokens]
    current, proximal, behavior = (torch.tensor([token[i] for token in flat], dtype=dtype) for i in range(3))
    index = torch.tensor([s for s, tokens in enumerate(sequences) for _ in tokens], dtype=torch.int64)
    current.requires_grad_()
    output = policy_loss(
        algorithm,
        LossInputs(
            current_logprobs_C=current,
            proximal_logprobs_C=proximal if algorithm.needs_proximal else None,
            behavior_logprobs_C=behavior,
            advantages_S=torch.tensor(advantages, dtype=dtype),
            sequence_index_C=index,
        ),
        of,
    )
    (gradient,) = torch.autograd.grad(output.loss, current)
    return output, gradient


def whole(sequences: list[list[Token]]) -> Denominators:
    return Denominators(sequences=float(len(sequences)), tokens=float(sum(map(len, sequences))), max_tokens=MAX_TOKENS)


# -- loss and gradient


def test_there_is_a_reference_for_every_preset() -> None:
    assert REFERENCE.keys() == PRESETS.keys()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradient_equal_the_reference_in_float64(preset: str, case: str) -> None:
    sequences, advantages = CASES[case]()
    of = whole(sequences)
    loss, gradient, scale = reference(preset, sequences, advantages, of)
    output, found = run(PRESETS[preset], sequences, advantages, of)
    assert output.loss.item() == pytest.approx(loss, abs=1e-12 * scale)
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64), rtol=1e-11, atol=1e-18)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_float32_loss_and_gradient_equal_the_reference_to_single_precision(preset: str, case: str) -> None:
    sequences, advantages = CASES[case]()
    sequences, advantages = rounded(sequences, torch.float32), torch.tensor(advantages).tolist()
    of = whole(sequences)
    loss, gradient, scale = reference(preset, sequences, advantages, of)
    output, found = run(PRESETS[preset], sequences, advantages, of, torch.float32)
    assert output.loss.dtype == torch.float32 and output.loss.shape == ()
    assert output.loss.item() == pytest.approx(loss, abs=3e-6 * scale)
    torch.testing.assert_close(found.double(), torch.tensor(gradient, dtype=torch.float64), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cases_are_on_both_sides_of_every_bound(preset: str) -> None:
    cuts = [policy_metrics(run(PRESETS[preset], *case(), whole(case()[0]))[0].stats) for case in CASES.values()]
    algorithm = PRESETS[preset]
    treatments = {algorithm.surrogate.treatment, algorithm.correction.treatment}
    expected = {f"policy/{treatment}_fraction" for treatment in treatments - {"raw"}}
    if algorithm.surrogate.probability_gap is not None:
        expected.add("policy/mask_fraction")
    for name in ("policy/clip_fraction", "policy/mask_fraction", "policy/truncate_fraction"):
        shares = [cut[name] for cut in cuts]
        assert any(0 < share < 1 for share in shares) if name in expected else not any(shares), name


def test_grpo_of_two_tokens_by_hand() -> None:
    # Ratios 1.5 (clipped to 1.28) and 0.9, advantage 2: -(2 x 1.28 + 2 x 0.9) / 8 / 1 = -0.545;
    # the clipped token has no gradient, the other -2 x 0.9 / 8 = -0.225.
    tokens = [(-1 + math.log(1.5), -1.0, -1.0), (-2 + math.log(0.9), -2.0, -2.0)]
    output, gradient = run(PRESETS["grpo"], [tokens], [2.0], whole([tokens]))
    assert output.loss.item() == pytest.approx(-0.545)
    assert gradient.tolist() == pytest.approx([0.0, -0.225])


def test_sequence_masking_by_hand() -> None:
    # rho = 2 x 1.4 = 2.8 is kept, 2 x 1.6 = 3.2 is masked. On policy: -A x rho = -2.8 for each of two tokens,
    # / 8 tokens / 2 sequences = -0.35.
    def sequence(*ratios: float) -> list[Token]:
        return [(-1.0, -1.0, -1.0 - math.log(ratio)) for ratio in ratios]

    output, gradient = run(
        PRESETS["grpo_seq_mis"], [sequence(2, 1.4), sequence(2, 1.6)], [1.0, 1.0], whole([sequence(2, 1)] * 2)
    )
    assert output.loss.item() == pytest.approx(-0.35)
    assert gradient.tolist() == pytest.approx([-0.175, -0.175, 0.0, 0.0])


def test_dual_clip_by_hand() -> None:
    # Ratio 16, advantage -1: PPO's loss is 16, the dual clip stops it at 10; ratio 9 stays 9. Mean of the two: 9.5.
    tokens = [(-1.0, -1 - math.log(16), -1.0), (-1.0, -1 - math.log(9), -1.0)]
    output, gradient = run(PRESETS["dapo"], [tokens], [-1.0], whole([tokens]))
    assert output.loss.item() == pytest.approx(9.5)
    assert gradient.tolist() == pytest.approx([0.0, 4.5])


@pytest.mark.parametrize("preset", PRESETS)
def test_no_tokens_give_a_zero_loss_that_can_be_differentiated(preset: str) -> None:
    output, gradient = run(PRESETS[preset], [[], []], [1.0, -1.0], whole([[(0.0, 0.0, 0.0)]]), torch.float32)
    assert output.loss.item() == 0 and gradient.shape == (0,)


def test_missing_anchor_is_refused_by_name() -> None:
    tokens = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="grpo needs proximal_logprobs"):
        policy_loss(
            PRESETS["grpo"],
            LossInputs(
                current_logprobs_C=tokens,
                proximal_logprobs_C=None,
                behavior_logprobs_C=tokens.detach(),
                advantages_S=torch.ones(1),
                sequence_index_C=torch.zeros(1, dtype=torch.int64),
            ),
            Denominators(sequences=1, tokens=1, max_tokens=1),
        )


# -- equivalences


def test_gspo_gradient_is_that_of_the_sequence_ratio_itself() -> None:
    # Mean drifts of 5e-4 up or down: sequences 0 (up, A > 0) and 3 (down, A < 0) are clipped, 1 and 2 are not.
    draw = torch.Generator().manual_seed(3)
    proximal = -torch.rand(4, 5, generator=draw, dtype=torch.float64)
    noise = torch.randn(4, 5, generator=draw, dtype=torch.float64)
    drift = torch.tensor([[5e-4], [5e-4], [-5e-4], [-5e-4]]) + 0.01 * (noise - noise.mean(1, keepdim=True))
    current = (proximal + drift).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)
    ratio = (current - proximal).mean(1).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages)
    (expected,) = torch.autograd.grad(-objective.mean(), current)
    sequences = [
        [(c, p, 0.0) for c, p in zip(*pair, strict=True)]
        for pair in zip(current.tolist(), proximal.tolist(), strict=True)
    ]
    _, gradient = run(PRESETS["gspo"], sequences, advantages.tolist(), whole(sequences))
    assert (expected == 0).all(1).tolist() == [True, False, False, True]
    torch.testing.assert_close(gradient.view(4, 5), expected, rtol=1e-10, atol=1e-15)


def test_pg_seq_is_gradient_is_that_of_the_sequence_ratio_itself() -> None:
    behavior = torch.tensor([-0.3, -1.1, -0.2], dtype=torch.float64)
    current = torch.tensor([-0.4, -0.9, -0.25], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(-0.7 * (current - behavior).sum().exp() / MAX_TOKENS, current)
    tokens = [(c, 0.0, b) for c, b in zip(current.tolist(), behavior.tolist(), strict=True)]
    _, gradient = run(PRESETS["pg_seq_is"], [tokens], [0.7], whole([tokens]))
    torch.testing.assert_close(gradient, expected)


def test_on_policy_without_mismatch_all_unmasked_gradients_are_plain_policy_gradients() -> None:
    tokens = [(-0.5, -0.5, -0.5), (-1.5, -1.5, -1.5)]
    for preset, algorithm in PRESETS.items():
        same = replace(algorithm, aggregation="constant_length")
        _, gradient = run(same, [tokens, tokens], [1.0, -2.0], whole([tokens] * 2))
        assert gradient.tolist() == pytest.approx([-1 / 16, -1 / 16, 2 / 16, 2 / 16]), preset


@settings(max_examples=60, deadline=None, derandomize=True)
@given(preset=st.sampled_from(sorted(PRESETS)), parts=st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_micro_batches_add_up_to_the_batch_however_it_is_split(preset: str, parts: list[int]) -> None:
    sequences, advantages = several_tokens()
    sequences, advantages = sequences[:60], advantages[:60]
    algorithm, of = PRESETS[preset], whole(sequences)
    all_at_once, _ = run(algorithm, sequences, advantages, of)
    pieces = [
        run(algorithm, [sequences[i] for i in mine], [advantages[i] for i in mine], of)[0]
        for part in range(4)
        if (mine := [i for i in range(60) if parts[i] == part])
    ]
    assert sum(piece.loss.item() for piece in pieces) == pytest.approx(all_at_once.loss.item(), rel=1e-11, abs=1e-13)
    stats = sum((piece.stats for piece in pieces[1:]), start=pieces[0].stats)
    for name in declared_reductions(type(stats)):
        assert getattr(stats, name).item() == pytest.approx(getattr(all_at_once.stats, name).item(), rel=1e-10), name
