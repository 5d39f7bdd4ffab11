"""The transform of a model's logits is read from its configuration, and has the right gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from betterhalf.models.logits import logit_transform
from betterhalf.ops import PLAIN_LOGITS, LogitTransform
from betterhalf.training.token_scores import Head, LogitsWorkspace, logprobs_and_entropies, measure_tokens
from betterhalf.training.top_scores import top_logprobs

TRANSFORM = LogitTransform(scale=0.7, cap=2.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "granite", "logits_scaling": 8.0}, LogitTransform(scale=0.125)),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, LogitTransform(scale=8.0)),
        ({"model_type": "cohere2", "logit_scale": 0.25}, LogitTransform(scale=0.25)),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, LogitTransform(cap=30.0)),
        ({"model_type": "gemma3_text", "final_logit_softcapping": None}, PLAIN_LOGITS),
        ({"model_type": "llama", "logit_scale": 0.25}, PLAIN_LOGITS),
    ],
)
def test_the_same_key_means_what_the_architecture_does_with_it(config: dict[str, Any], expected: Any) -> None:
    assert logit_transform(SimpleNamespace(**config)) == expected


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (9, 600))
    return hidden, weight, torch.randint(600, (9,), generator=generator)


def transformed(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the log-softmax at temperature 0.8, in float64 by autograd."""
    return (2.5 * torch.tanh(0.7 * (hidden @ weight.t()) / 2.5) / 0.8).log_softmax(-1)


@pytest.mark.parametrize("rows", [2, 9])
def test_logprobs_entropies_and_gradients_equal_float64(rows: int) -> None:
    hidden, weight, targets = problem()
    head = Head(weight=weight, logits_weight=weight.detach(), grad_weight=weight.detach(), transform=TRANSFORM)
    workspace = LogitsWorkspace(logits=600 * rows)
    logprobs, entropies = logprobs_and_entropies(hidden, head, targets, 0.8, workspace)
    (logprobs.sum() + 0.3 * entropies.sum()).backward()
    wide, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = transformed(wide, wide_weight)
    chosen = expected.gather(1, targets[:, None])[:, 0]
    entropy = -(expected.exp() * expected).sum(-1)
    (chosen.sum() + 0.3 * entropy.sum()).backward()
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies.double(), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    measured, _ = measure_tokens(hidden.detach(), head, targets, 0.8, workspace)
    assert torch.equal(measured, logprobs.detach())


def test_top_logprobs_are_transformed_too() -> None:
    hidden, weight, targets = problem()
    head = Head(weight=weight, logits_weight=weight.detach(), grad_weight=weight.detach(), transform=TRANSFORM)
    ids = torch.stack((targets, (targets + 1) % 600), 1)
    found = top_logprobs(hidden, head, ids, 0.8, LogitsWorkspace(logits=1200))
    found.sum().backward()
    wide = hidden.detach().double().requires_grad_()
    expected = transformed(wide, weight.detach().double()).gather(1, ids)
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
