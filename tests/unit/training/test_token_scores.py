"""Chunked logprobs equal float64 arithmetic, forward and backward, whatever the chunk."""

from __future__ import annotations

import pytest
import torch

from betterhalf import ops
from betterhalf.training import token_scores
from betterhalf.training.token_scores import (
    Head,
    LogitsWorkspace,
    logprobs_and_entropies,
    measure_tokens,
    token_logprobs,
)

VOCABULARY = 600
"""Vocabulary of three chunks with the minimum number of columns."""


def workspace(rows: int) -> LogitsWorkspace:
    """Return a workspace with `rows` rows in a forward chunk, and 256 columns in a backward chunk."""
    return LogitsWorkspace(logits=rows * VOCABULARY)


def head(weight: torch.Tensor, *, wide: bool = False) -> Head:
    values = weight.detach().float() if wide else weight.detach()
    return Head(weight=weight, logits_weight=values, grad_weight=values)


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 8, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, 8, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (11,), generator=generator)
    upstream = torch.randn(11, generator=generator)
    return hidden, weight, targets, upstream


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = ((h @ w.t()) / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (logprobs * upstream.double()).sum().backward()
    assert h.grad is not None and w.grad is not None
    return logprobs.detach(), h.grad, w.grad


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_and_backward_equal_float64(rows: int, temperature: float) -> None:
    hidden, weight, targets, upstream = problem(torch.float32)
    logprobs64, grad_hidden64, grad_weight64 = reference(hidden, weight, targets, upstream, temperature)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = token_logprobs(hidden, head(weight), targets, temperature, workspace(rows))
    (logprobs * upstream).sum().backward()
    torch.testing.assert_close(logprobs.double(), logprobs64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden64, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double(), grad_weight64, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_half_gradients_are_rounded_once_after_the_sum_over_chunks() -> None:
    hidden, weight, targets, upstream = problem(torch.float16)
    _, grad_hidden64, grad_weight64 = reference(hidden, weight, targets, upstream, 1.0)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = token_logprobs(hidden, head(weight, wide=True), targets, 1.0, workspace(2))
    (logprobs * upstream).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert weight.grad.dtype == torch.float16
    # one rounding: half an ulp of FP16, relative 2^-11, plus FP32 noise
    torch.testing.assert_close(weight.grad.double(), grad_weight64, rtol=2**-11 * 1.01, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden64, rtol=2**-11 * 1.01, atol=1e-6)


def test_where_half_products_are_native_the_logits_gradient_is_rounded_to_half_before_them() -> None:
    hidden, weight, targets, upstream = problem(torch.bfloat16)
    logprobs64, grad_hidden64, grad_weight64 = reference(hidden, weight, targets, upstream, 1.0)
    hidden.requires_grad_(), weight.requires_grad_()
    values = weight.detach()
    native = Head(weight=weight, logits_weight=values.float(), grad_weight=values)
    logprobs = token_logprobs(hidden, native, targets, 1.0, workspace(2))
    (logprobs * upstream).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(logprobs.double(), logprobs64, rtol=1e-5, atol=1e-6)  # logits are still FP32
    for found, exact in ((hidden.grad, grad_hidden64), (weight.grad, grad_weight64)):
        assert found.dtype == torch.bfloat16
        assert 2**-11 < (found.double() - exact).norm() / exact.norm() < 2**-7


def test_measuring_gives_the_bits_of_training_and_the_entropy() -> None:
    hidden, weight, targets, _ = problem(torch.float32)
    trained = token_logprobs(hidden, head(weight), targets, 0.7, workspace(4))
    measured, entropies = measure_tokens(hidden, head(weight), targets, 0.7, workspace(4))
    assert torch.equal(trained, measured)
    p = ((hidden.double() @ weight.double().t()) / 0.7).softmax(-1)
    torch.testing.assert_close(entropies.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_chunks_fit_the_budget_and_the_cache() -> None:
    one_mib = LogitsWorkspace(logits=2**18)
    assert one_mib.rows(1024) == 256
    assert one_mib.rows(10**7) == 1
    assert one_mib.columns(512, on_cpu=True) == one_mib.columns(512, on_cpu=False) == 512
    assert one_mib.columns(10**6, on_cpu=True) == 256
    large = LogitsWorkspace(logits=2**26)
    assert large.columns(512, on_cpu=True) == 4096  # 8 MiB
    assert large.columns(512, on_cpu=False) == 2**17


def test_targets_are_found_in_every_chunk() -> None:
    hidden, weight, _, upstream = problem(torch.float32)
    targets = torch.tensor([0, 255, 256, 257, 511, 512, 513, 599, 300, 1, 598])
    _, grad_hidden64, grad_weight64 = reference(hidden, weight, targets, upstream, 1.0)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = token_logprobs(hidden, head(weight), targets, 1.0, workspace(3))
    (logprobs * upstream).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), grad_hidden64, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double(), grad_weight64, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_parts_of_the_vocabulary_are_put_together_from_kept_logits_too(
    rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scores, "_CACHED_LOGITS", 1)  # 256 columns at a time
    hidden, weight, targets, upstream = problem(torch.float32)
    _, grad_hidden64, grad_weight64 = reference(hidden, weight, targets, upstream, temperature)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = token_logprobs(hidden, head(weight), targets, temperature, workspace(rows))
    for _ in range(2):
        hidden.grad = weight.grad = None
        (logprobs * upstream).sum().backward(retain_graph=True)
        torch.testing.assert_close(hidden.grad.double(), grad_hidden64, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
        torch.testing.assert_close(weight.grad.double(), grad_weight64, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_logits_use_the_same_memory_in_every_pass_and_mode() -> None:
    hidden, weight, targets, _ = problem(torch.float32)
    chunk = workspace(11)
    with torch.inference_mode():
        first = measure_tokens(hidden, head(weight), targets, 1.0, chunk)[0].clone()
    place = chunk.multiply(hidden, weight).data_ptr()
    trained = token_logprobs(hidden.requires_grad_(), head(weight), targets, 1.0, chunk)
    trained.sum().backward()
    assert torch.equal(first, trained)
    assert chunk.multiply(hidden.detach()[:4], weight).data_ptr() == place


def test_a_pass_between_forward_and_backward_leaves_the_gradient_alone() -> None:
    """Overwrite the logits kept by one pass with those of another."""
    hidden, weight, targets, upstream = problem(torch.float32)
    grads = []
    for disturbed in (False, True):
        chunk, leaf = workspace(11), hidden.clone().requires_grad_()
        logprobs = token_logprobs(leaf, head(weight), targets, 1.0, chunk)
        if disturbed:
            measure_tokens(3 * hidden, head(weight), targets, 1.0, chunk)
        (logprobs * upstream).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_are_normalised_a_few_at_a_time_with_the_same_bits(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, taken = torch.randn(3, 5, 40, generator=generator), torch.randint(40, (3, 5), generator=generator)
    whole = ops.logprobs_and_entropy(logits, taken, temperature)
    for at_once in (1, 90, 400):
        monkeypatch.setattr(ops, "_AT_ONCE", at_once)
        assert torch.equal(ops.token_logprobs(logits, taken, temperature), whole[0])
        for found, expected in zip(ops.logprobs_and_entropy(logits, taken, temperature), whole, strict=True):
            assert torch.equal(found, expected)
    exact = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(whole[1].double(), -(exact.exp() * exact).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole[0].double(), exact.gather(-1, taken.unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=0)


def test_shared_logprob_definition_is_fp32_even_for_half_logits() -> None:
    logits = torch.tensor([[10.0, 10.0, 10.0, -60000.0]], dtype=torch.float16)
    logprob = ops.token_logprobs(logits, torch.tensor([1]))
    assert logprob.dtype == torch.float32
    # log(1/3) = -1.0986123, which FP16 would give as -1.0986328
    assert abs(float(logprob) + 1.0986123) < 1e-6


# -- entropy


def reference_with_entropy(
    problem: tuple[torch.Tensor, ...], bonus: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float64 entropies, and the gradients of sum(upstream x logprobs + bonus x entropies)."""
    hidden, weight, targets, upstream = problem
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = ((h @ w.t()) / temperature).log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    (logprobs * upstream.double() + entropies * bonus.double()).sum().backward()
    assert h.grad is not None and w.grad is not None
    return entropies.detach(), h.grad, w.grad


BONUS = torch.linspace(-1.0, 2.0, 11)


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_and_their_gradients_equal_float64(rows: int, temperature: float) -> None:
    hidden, weight, targets, upstream = problem(torch.float32)
    expected = reference_with_entropy(problem(torch.float32), BONUS, temperature)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropies = logprobs_and_entropies(hidden, head(weight), targets, temperature, workspace(rows))
    (logprobs * upstream + entropies * BONUS).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(entropies.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), expected[2], rtol=1e-4, atol=1e-5)


def test_the_slope_of_the_entropy_equals_finite_differences() -> None:
    """Move the hidden state of one row; no formula of the gradient is used."""
    hidden, weight, targets, _ = problem(torch.float32)
    leaf = hidden.clone().requires_grad_()
    _, entropies = logprobs_and_entropies(leaf, head(weight), targets, 1.0, workspace(4))
    entropies[5].backward()
    assert leaf.grad is not None and not leaf.grad[:5].any() and not leaf.grad[6:].any()

    def entropy(hidden_H: torch.Tensor) -> torch.Tensor:
        p = (weight.double() @ hidden_H).softmax(0)
        return -(p * p.log()).sum()

    for axis in range(hidden.shape[1]):
        move = 1e-5 * torch.eye(hidden.shape[1], dtype=torch.float64)[axis]
        slope = (entropy(hidden[5].double() + move) - entropy(hidden[5].double() - move)) / 2e-5
        assert leaf.grad[5, axis].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_logprobs_beside_entropies_have_the_bits_of_logprobs_alone(rows: int) -> None:
    hidden, weight, targets, upstream = problem(torch.float32)
    alone, beside = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logprobs = token_logprobs(alone, head(weight), targets, 0.7, workspace(rows))
    found, entropies = logprobs_and_entropies(beside, head(weight), targets, 0.7, workspace(rows))
    assert torch.equal(found, logprobs)
    assert torch.equal(entropies, measure_tokens(hidden, head(weight), targets, 0.7, workspace(rows))[1])
    (logprobs * upstream).sum().backward()
    (found * upstream).sum().backward()
    assert torch.equal(beside.grad, alone.grad)  # type: ignore[arg-type]


def test_the_entropy_gradient_of_half_weights_is_rounded_once() -> None:
    hidden, weight, targets, upstream = problem(torch.float16)
    _, grad_hidden64, grad_weight64 = reference_with_entropy(problem(torch.float16), BONUS, 1.0)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropies = logprobs_and_entropies(hidden, head(weight, wide=True), targets, 1.0, workspace(2))
    (logprobs * upstream + entropies * BONUS).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), grad_weight64, rtol=2**-11 * 1.02, atol=2e-6)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden64, rtol=2**-11 * 1.02, atol=2e-6)
