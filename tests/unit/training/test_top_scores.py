"""Logprobs of several tokens of each row equal float64 arithmetic, forward and backward, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from tests.unit.training.test_token_scores import VOCABULARY, head, problem, workspace

from betterhalf.training.token_scores import token_logprobs
from betterhalf.training.top_scores import top_logprobs


def ids() -> torch.Tensor:
    """Return five different tokens for each row, in every chunk of the vocabulary."""
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(VOCABULARY, generator=generator)[:5] for _ in range(11)])


@pytest.mark.parametrize("rows", [2, 11])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_and_backward_equal_float64(rows: int, temperature: float) -> None:
    hidden, weight, _, _ = problem(torch.float32)
    upstream = torch.randn(11, 5, generator=torch.Generator().manual_seed(5))
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = ((h @ w.t()) / temperature).log_softmax(-1).gather(1, ids())
    (expected * upstream.double()).sum().backward()
    hidden.requires_grad_(), weight.requires_grad_()
    found = top_logprobs(hidden, head(weight), ids(), temperature, workspace(rows))
    (found * upstream).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_the_logprobs_are_those_of_single_tokens_bit_for_bit() -> None:
    hidden, weight, _, _ = problem(torch.float16)
    found = top_logprobs(hidden, head(weight, wide=True), ids(), 0.7, workspace(4))
    for place in range(5):
        single = token_logprobs(hidden, head(weight, wide=True), ids()[:, place], 0.7, workspace(4))
        assert torch.equal(found[:, place], single)


def test_both_passes_add_to_the_gradient_of_one_head() -> None:
    hidden, weight, targets, upstream = problem(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    shared = workspace(11)
    for together in (True, False):
        parts = []
        for some in ((True, True),) if together else ((True, False), (False, True)):
            hidden.grad = weight.grad = None
            # The second pass overwrites the logits of the first, which its backward pass must not reuse.
            loss = hidden.sum() * 0
            if some[0]:
                loss = loss + (token_logprobs(hidden, head(weight), targets, 1.0, shared) * upstream).sum()
            if some[1]:
                loss = loss + top_logprobs(hidden, head(weight), ids(), 1.0, shared)[:, 1].sum()
            loss.backward()
            assert hidden.grad is not None and weight.grad is not None
            parts.append((hidden.grad, weight.grad))
        total = [sum(grads) for grads in zip(*parts, strict=True)]
        if together:
            expected = total
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
