"""Attention in blocks of several sizes against float64 attention with an explicit mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from betterhalf.models import blocked_attention as module
from betterhalf.models.blocked_attention import ScoreRule, blocked_attention

N, HEADS, KV_HEADS, D = 3, 4, 2, 8


@pytest.fixture(params=[(128, 2**21), (3, 2**21), (3, 1), (128, 40)], autouse=True)
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split into one block, by queries, by queries and heads, and by heads."""
    monkeypatch.setattr(module, "_QUERIES", request.param[0])
    monkeypatch.setattr(module, "_MAX_QK", request.param[1])


def problem(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and a gradient of the result: FP32 tensors with values of `dtype` and transformers' strides."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(N, length, heads, D, generator=generator).to(dtype).float().transpose(1, 2)

    return draw(HEADS, queries), draw(KV_HEADS, keys), draw(KV_HEADS, keys), draw(HEADS, queries)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None = None) -> Tensor:
    """Return attention with an explicit mask, in the dtype of the operands."""
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    visible = (distance >= 0) & (distance < (window or keys))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if cap is None else cap * (scores / cap).tanh()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("cap", [None, 0.5, 50.0])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (8, 13), (1, 9)])
def test_results_and_gradients_equal_float64(queries: int, keys: int, window: int | None, cap: float | None) -> None:
    *operands, upstream = problem(queries, keys)
    ours = [x.requires_grad_() for x in operands]
    wide = [x.detach().double().requires_grad_() for x in operands]
    out = blocked_attention(*ours, ScoreRule(scale=0.3, window=window, cap=cap))
    expected = exact(*wide, 0.3, window, cap)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(ours, wide, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=2e-6)  # type: ignore[union-attr]


def test_probabilities_are_rounded_before_they_meet_the_values() -> None:
    # Two keys with q k = 0 and log 2, so probabilities of 1/3 and 2/3; the values select the first.
    q = torch.tensor([1.0]).view(1, 1, 1, 1)
    k = torch.tensor([0.0, 2.0]).log().clamp(min=0).view(1, 1, 2, 1)
    v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    unrounded = float(blocked_attention(q, k, v, ScoreRule(scale=1.0)))
    rounded = float(blocked_attention(q, k, v, ScoreRule(scale=1.0), operands=torch.bfloat16))
    assert unrounded == pytest.approx(1 / 3, abs=1e-7)
    assert rounded == 0.333984375  # 171 / 512, the nearest BF16


@pytest.mark.parametrize("window", [None, 2])
def test_bf16_operands_cost_bf16_rounding_and_no_more(window: int | None) -> None:
    *operands, upstream = problem(8, 13, torch.bfloat16)
    ours = [x.requires_grad_() for x in operands]
    wide = [x.detach().double().requires_grad_() for x in operands]
    out = blocked_attention(*ours, ScoreRule(scale=0.3, window=window), operands=torch.bfloat16)
    expected = exact(*wide, 0.3, window)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for found, wanted in [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, wide, strict=True))]:
        assert found is not None and wanted is not None
        error = (found.double() - wanted).norm() / wanted.norm()
        assert 2**-11 < error < 2**-7


def test_no_quadratic_tensor_is_saved_for_the_backward_pass() -> None:
    q, k, v, _ = (x.requires_grad_() for x in problem(50, 50))
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        blocked_attention(q, k, v, ScoreRule(scale=0.3))
    assert sorted(kept) == sorted(x.numel() for x in (q, k, v))


def test_the_same_operands_give_the_same_bits_with_and_without_gradients() -> None:
    q, k, v, _ = problem(8, 13)
    with torch.inference_mode():
        plain = blocked_attention(q, k, v, ScoreRule(scale=0.3)).clone()
    assert torch.equal(blocked_attention(q.requires_grad_(), k, v, ScoreRule(scale=0.3)), plain)
