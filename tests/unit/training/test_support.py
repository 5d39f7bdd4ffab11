"""Logprobs over the support equal float64 arithmetic with -inf masking, forward and backward, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.token_support import PackedSupport, encode
from betterhalf.training import token_scores
from betterhalf.training.support import SupportMask
from betterhalf.training.token_scores import (
    Head,
    LogitsWorkspace,
    logprobs_and_entropies,
    measure_tokens,
    token_logprobs,
)

VOCABULARY = 700
"""Tokens: a bitmap takes 22 words, and the backward pass three chunks of 256 columns."""
ROWS = 13


def problem(seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, targets, upstream gradients, and the kept tokens, bool [C, V]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, 8, generator=generator)
    weight = torch.randn(VOCABULARY, 8, generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    upstream = torch.randn(ROWS, generator=generator)
    # One token, a few (ids), a third (bitmap), all but one, all.
    shares = [0.0, 0.01, 0.02, 0.03, 0.3, 0.5, 0.9, 1.0, 0.0, 0.01, 1.0, 0.4, 0.02]
    kept = torch.rand(ROWS, VOCABULARY, generator=generator) < torch.tensor(shares).unsqueeze(1)
    kept[11] = torch.arange(VOCABULARY) != 699
    targets[11] = 31
    kept.scatter_(1, targets.unsqueeze(1), True)
    return hidden, weight, targets, upstream, kept


def packed(kept: Tensor) -> PackedSupport:
    support = encode([row.nonzero().squeeze(1).tolist() for row in kept], [1.0] * len(kept), kept.shape[1])
    words = torch.frombuffer(bytearray(support.words or bytes(4)), dtype=torch.int32)[: len(support.words) // 4]
    return PackedSupport(vocabulary=kept.shape[1], counts_C=torch.tensor(support.counts), words_K=words)


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, kept: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprobs, entropies, and the gradients of hidden states and weight, by autograd in float64."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    masked = ((h @ w.t()) / temperature).masked_fill(~kept, -torch.inf)
    every = masked.log_softmax(-1)
    logprobs = every.gather(1, targets[:, None]).squeeze(1)
    (logprobs * upstream.double()).sum().backward()
    assert h.grad is not None and w.grad is not None
    entropies = torch.special.entr(masked.detach().softmax(-1)).sum(-1)
    return logprobs.detach(), entropies, h.grad, w.grad


def test_the_mask_is_that_of_the_sets_in_any_block() -> None:
    *_, kept = problem()
    mask = SupportMask.of(packed(kept))
    logits = torch.randn(ROWS, VOCABULARY)
    for row, rows, column, columns in (
        (0, ROWS, 0, VOCABULARY),
        (3, 5, 0, VOCABULARY),
        (0, ROWS, 257, 43),
        (12, 1, 699, 1),
    ):
        block = logits[row : row + rows, column : column + columns].clone()
        expected = block.masked_fill(~kept[row : row + rows, column : column + columns], -torch.inf)
        mask.restrict(block, row=row, column=column)
        assert torch.equal(block, expected)


@pytest.mark.parametrize("cached", [2**21, 1], ids=["whole rows", "parts of the vocabulary"])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_equal_float64_autograd(
    rows: int, temperature: float, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scores, "_CACHED_LOGITS", cached)
    hidden, weight, targets, upstream, kept = problem()
    logprobs64, entropies64, *gradients64 = reference(hidden, weight, targets, upstream, kept, temperature)
    hidden.requires_grad_(), weight.requires_grad_()
    values, mask = weight.detach(), SupportMask.of(packed(kept))
    head, workspace = (
        Head(weight=weight, logits_weight=values, grad_weight=values),
        LogitsWorkspace(logits=rows * VOCABULARY),
    )
    measured, entropies = measure_tokens(hidden, head, targets, temperature, workspace, mask)
    logprobs = token_logprobs(hidden, head, targets, temperature, workspace, mask)
    assert torch.equal(logprobs.detach(), measured)
    (logprobs * upstream).sum().backward()
    torch.testing.assert_close(logprobs.detach().double(), logprobs64, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(entropies.double(), entropies64, rtol=1e-5, atol=2e-6)
    for found, exact in zip((hidden.grad, weight.grad), gradients64, strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [4, 100])
def test_an_entropy_bonus_has_the_gradient_of_the_truncated_entropy(rows: int) -> None:
    hidden, weight, targets, upstream, kept = problem()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    masked = ((h @ w.t()) / 0.7).masked_fill(~kept, -torch.inf)
    logprobs64 = masked.log_softmax(-1)
    entropies64 = -(logprobs64.exp() * logprobs64.masked_fill(~kept, 0.0)).sum(-1)
    (logprobs64.gather(1, targets[:, None]).squeeze(1) * upstream + entropies64 * upstream.flip(0)).sum().backward()
    hidden.requires_grad_(), weight.requires_grad_()
    head = Head(weight=weight, logits_weight=weight.detach(), grad_weight=weight.detach())
    workspace, mask = LogitsWorkspace(logits=rows * VOCABULARY), SupportMask.of(packed(kept))
    logprobs, entropies = logprobs_and_entropies(hidden, head, targets, 0.7, workspace, mask)
    torch.testing.assert_close(entropies.detach().double(), entropies64.detach(), rtol=1e-5, atol=2e-6)
    (logprobs * upstream + entropies * upstream.flip(0)).sum().backward()
    for found, exact in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert found is not None and exact is not None
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=2e-5)


def test_one_token_has_no_entropy_no_logprob_and_no_gradient() -> None:
    """Require exact zeros, so that `top_k = 1` trains nothing rather than noise."""
    hidden, weight, targets, upstream, kept = problem()
    alone = torch.zeros_like(kept).scatter_(1, targets.unsqueeze(1), True)
    hidden.requires_grad_(), weight.requires_grad_()
    head = Head(weight=weight, logits_weight=weight.detach(), grad_weight=weight.detach())
    workspace, mask = LogitsWorkspace(logits=4 * VOCABULARY), SupportMask.of(packed(alone))
    measured, entropies = measure_tokens(hidden, head, targets, 0.7, workspace, mask)
    assert not measured.any() and not entropies.any()
    (token_logprobs(hidden, head, targets, 0.7, workspace, mask) * upstream).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_the_whole_vocabulary_gives_the_bits_of_no_support() -> None:
    hidden, weight, targets, _, kept = problem()
    head = Head(weight=weight, logits_weight=weight, grad_weight=weight)
    workspace, mask = LogitsWorkspace(logits=4 * VOCABULARY), SupportMask.of(packed(torch.ones_like(kept)))
    plain = measure_tokens(hidden, head, targets, 0.7, workspace)
    restricted = measure_tokens(hidden, head, targets, 0.7, workspace, mask)
    assert all(torch.equal(a, b) for a, b in zip(plain, restricted, strict=True))


def test_a_token_outside_the_support_has_no_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    logprobs, entropies = ops.logprobs_and_entropy(logits, torch.tensor([2]), truncated=True)
    assert logprobs.tolist() == [-torch.inf]
    p = torch.tensor([0.0, 1.0]).double().softmax(0)
    torch.testing.assert_close(entropies.double(), -(p * p.log()).sum().unsqueeze(0), rtol=1e-6, atol=1e-7)
