"""Packed attention: completions see their prompt, but no sibling, no later token, and nothing before their window."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from betterhalf.batches import PackedSegment
from betterhalf.errors import InputError
from betterhalf.models.attention import (
    AttentionFunction,
    PackLayout,
    packed_attention,
    packed_attention_exact,
    packed_attention_fp32_sums,
    packed_attention_varlen,
    repeat_prefixes,
    segment_batches,
)

LENGTHS = (3, 3, 5, 1, 5, 2, 2, 2, 4)
PREFIXES = (None, None, None, None, None, 0, 1, 0, 2)
SEGMENTS = tuple(PackedSegment(length=n, prefix=p) for n, p in zip(LENGTHS, PREFIXES, strict=True))
"""Segments: five sequences or prompts, then completions: two of the first, one of the second, one of the third."""
LAYOUT = PackLayout(SEGMENTS)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return (
        torch.randn(1, 4, total, 8, generator=generator).to(dtype),
        torch.randn(1, 2, total, 8, generator=generator).to(dtype),
        torch.randn(1, 2, total, 8, generator=generator).to(dtype),
    )


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float | None = None) -> Tensor:
    """Return float64 attention with an explicit mask over the whole pack: [T, heads, D]."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    prefix = torch.tensor([-1 if p is None else p for p in PREFIXES])[owner]
    first = torch.tensor([0 if p is None else LENGTHS[p] for p in PREFIXES])
    position = torch.cat([first[n] + torch.arange(length) for n, length in enumerate(LENGTHS)])
    distance = position[:, None] - position[None, :]
    visible = ((owner[:, None] == owner[None, :]) | (prefix[:, None] == owner[None, :])) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    q, k, v = (x[0].double() for x in (q, k, v))
    k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))
    qk = q @ k.transpose(1, 2) * 8**-0.5
    qk = qk if cap is None else cap * (qk / cap).tanh()
    return (qk.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def test_segments_of_a_batch_have_equal_lengths_and_prefix_lengths() -> None:
    batches = [(batch.count, batch.length, batch.prefix_length, batch.prefixes) for batch in segment_batches(SEGMENTS)]
    assert batches == [
        (2, 3, 0, ()),
        (1, 5, 0, ()),
        (1, 1, 0, ()),
        (1, 5, 0, ()),
        (3, 2, 3, ((0, 0), (0, 1), (0, 0))),
        (1, 4, 5, ((1, 0),)),
    ]


def test_prefixes_are_repeated_before_their_completions() -> None:
    rows = torch.arange(sum(LENGTHS))[:, None, None]
    expected = [*range(17), 0, 1, 2, 17, 18, 3, 4, 5, 19, 20, 0, 1, 2, 21, 22, 6, 7, 8, 9, 10, 23, 24, 25, 26]
    assert repeat_prefixes(rows, SEGMENTS).flatten().tolist() == expected
    assert repeat_prefixes(rows, SEGMENTS[:5]) is rows


@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_equals_float64_attention_with_an_explicit_mask(window: int | None) -> None:
    q, k, v = qkv()
    out, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=8**-0.5, layout=LAYOUT, sliding_window=window)
    torch.testing.assert_close(out[0].double(), by_hand(q, k, v, window), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [packed_attention, packed_attention_exact, packed_attention_fp32_sums])
def test_every_kernel_of_a_cpu_honours_a_soft_cap(kernel: AttentionFunction) -> None:
    q, k, v = qkv()
    out, _ = kernel(nn.Identity(), q, k, v, None, scaling=8**-0.5, layout=LAYOUT, sliding_window=4, softcap=0.5)
    torch.testing.assert_close(out[0].double(), by_hand(q, k, v, 4, 0.5), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out[0].double(), by_hand(q, k, v, 4), rtol=1e-3)


@pytest.mark.parametrize("window", [None, 2, 4])
def test_gradients_equal_float64_ones_with_an_explicit_mask(window: int | None) -> None:
    weights = torch.randn(sum(LENGTHS), 4, 8, generator=torch.Generator().manual_seed(1))
    ours, exact = ([x.detach().clone().requires_grad_() for x in qkv()] for _ in range(2))
    out, _ = packed_attention(nn.Identity(), *ours, None, scaling=8**-0.5, layout=LAYOUT, sliding_window=window)
    (out[0] * weights).sum().backward()
    (by_hand(*exact, window) * weights).sum().backward()
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_sums_round_only_the_result(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    out, _ = packed_attention_fp32_sums(nn.Identity(), q, k, v, None, scaling=8**-0.5, layout=LAYOUT)
    exact = by_hand(q, k, v, None)
    half_ulp = torch.finfo(dtype).eps / 2
    assert out.dtype == dtype
    assert ((out[0].double() - exact).abs() <= exact.abs() * half_ulp * 1.01 + 1e-6).all()


def test_one_sequence_s_keys_do_not_reach_another() -> None:
    q, k, v = qkv()
    first, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=1.0, layout=LAYOUT)
    v[:, :, 3:6] += 100.0  # the second sequence, whose completion is at 19 and 20
    second, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=1.0, layout=LAYOUT)
    changed = (first != second).flatten(2).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [3, 4, 5, 19, 20]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *_: int,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what the CUDA kernel documents: q [T, heads, D], keys by cu_k; row i of L sees keys up to K - L + i."""
    parts = []
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for n in range(len(cu_q) - 1):
        rows, keys, values = q[cu_q[n] : cu_q[n + 1]], k[cu_k[n] : cu_k[n + 1]], v[cu_k[n] : cu_k[n + 1]]
        last = torch.arange(len(rows))[:, None] + len(keys) - len(rows)
        place = torch.arange(len(keys))[None, :]
        visible = place <= last + window_size[1]
        if window_size[0] >= 0:
            visible &= place >= last - window_size[0]
        qk = torch.einsum("qhd,khd->hqk", rows.double(), keys.double()) * scale
        parts.append(torch.einsum("hqk,khd->qhd", qk.masked_fill(~visible, -torch.inf).softmax(-1), values.double()))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 2, 4])
def test_the_flash_kernel_is_given_each_prefix_as_keys(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    kernel = SimpleNamespace(varlen_attn=flash_attention)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", kernel)  # type: ignore[arg-type]
    q, k, v = qkv(torch.float16)
    out, _ = packed_attention_varlen(
        nn.Identity(), q, k, v, None, scaling=8**-0.5, layout=LAYOUT, sliding_window=window
    )
    torch.testing.assert_close(out[0], by_hand(q, k, v, window), rtol=1e-9, atol=1e-9)


def test_soft_capped_scores_do_not_go_to_the_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace())  # type: ignore[arg-type]
    q, k, v = qkv(torch.bfloat16)
    out, _ = packed_attention_varlen(nn.Identity(), q, k, v, None, scaling=8**-0.5, layout=LAYOUT, softcap=0.5)
    torch.testing.assert_close(out[0].double(), by_hand(q, k, v, None, 0.5), rtol=0.02, atol=0.02)


def test_blocks_stay_on_the_device_of_their_operands() -> None:
    """Tensors of the meta device stand for those of a GPU: one made on the CPU would not meet them."""
    q, k, v = (x.to("meta").requires_grad_() for x in qkv(torch.bfloat16))
    out, _ = packed_attention_fp32_sums(
        nn.Identity(), q, k, v, None, scaling=8**-0.5, layout=LAYOUT, sliding_window=2, softcap=0.5
    )
    out.sum().backward()
    assert out.is_meta and q.grad is not None and q.grad.is_meta


def test_dropout_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(InputError, match="attention_dropout=0.1.*set it to 0"):
        packed_attention(nn.Identity(), q, k, v, None, scaling=1.0, layout=LAYOUT, dropout=0.1)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_what_attention_does_not_compute_is_refused_by_name(asked: dict[str, Any], words: str) -> None:
    q, k, v = qkv()
    with pytest.raises(InputError, match=words):
        packed_attention(nn.Identity(), q, k, v, None, scaling=1.0, layout=LAYOUT, **asked)


def test_keywords_without_effect_are_accepted() -> None:
    q, k, v = qkv()
    harmless = {"softcap": None, "is_causal": True, "use_cache": False, "position_ids": torch.zeros(1)}
    out, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=8**-0.5, layout=LAYOUT, **harmless)
    torch.testing.assert_close(out[0].double(), by_hand(q, k, v, None), rtol=1e-5, atol=1e-5)


def test_a_mask_of_the_model_and_a_missing_layout_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(InputError, match="a mask of its own"):
        packed_attention(nn.Identity(), q, k, v, torch.zeros(1), scaling=1.0, layout=LAYOUT)
    with pytest.raises(InputError, match="do not pass keywords on"):
        packed_attention(nn.Identity(), q, k, v, None, scaling=1.0)
