"""Packed attention: sequences do not see each other, nor the future, nor beyond a sliding window."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from betterhalf.errors import InputError
from betterhalf.models.attention import (
    equal_length_runs,
    packed_attention,
    packed_attention_fp32_sums,
    require_packable,
)

LENGTHS = (3, 3, 5, 1, 5)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return (
        torch.randn(1, 4, total, 8, generator=generator).to(dtype),
        torch.randn(1, 2, total, 8, generator=generator).to(dtype),
        torch.randn(1, 2, total, 8, generator=generator).to(dtype),
    )


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """float64 attention with an explicit mask over the whole pack: [T, heads, D]."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position = torch.arange(sum(LENGTHS))
    distance = position[:, None] - position[None, :]
    visible = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    q, k, v = (x[0].double() for x in (q, k, v))
    k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * 8**-0.5).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def test_runs_of_equal_lengths() -> None:
    assert list(equal_length_runs(LENGTHS)) == [(0, 2, 3), (6, 1, 5), (11, 1, 1), (12, 1, 5)]


@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_equals_float64_attention_with_an_explicit_mask(window: int | None) -> None:
    q, k, v = qkv()
    out, _ = packed_attention(
        nn.Identity(), q, k, v, None, scaling=8**-0.5, sequence_lengths=LENGTHS, sliding_window=window
    )
    torch.testing.assert_close(out[0].double(), by_hand(q, k, v, window), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_sums_round_only_the_result(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    out, _ = packed_attention_fp32_sums(nn.Identity(), q, k, v, None, scaling=8**-0.5, sequence_lengths=LENGTHS)
    exact = by_hand(q, k, v, None)
    half_ulp = torch.finfo(dtype).eps / 2
    assert out.dtype == dtype
    assert ((out[0].double() - exact).abs() <= exact.abs() * half_ulp * 1.01 + 1e-6).all()


def test_one_sequence_s_keys_do_not_reach_another() -> None:
    q, k, v = qkv()
    first, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=1.0, sequence_lengths=LENGTHS)
    v[:, :, 3:6] += 100.0  # the second sequence
    second, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=1.0, sequence_lengths=LENGTHS)
    changed = (first != second).flatten(2).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [3, 4, 5]


def test_dropout_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(InputError, match="attention_dropout=0.1.*set it to 0"):
        packed_attention(nn.Identity(), q, k, v, None, scaling=1.0, sequence_lengths=LENGTHS, dropout=0.1)


def model(**config: Any) -> Any:
    module = nn.Linear(1, 1)
    module.config = SimpleNamespace(model_type="odd", **config)
    module._supports_attention_backend = True
    return module


def test_decoders_that_would_leak_across_packed_sequences_are_refused() -> None:
    require_packable(model(layer_types=["full_attention", "sliding_attention"]))
    with pytest.raises(InputError, match="linear_attention.*llama, mistral, qwen2 or qwen3"):
        require_packable(model(layer_types=["full_attention", "linear_attention"]))
    convolution = model()
    convolution.mixer = nn.Conv1d(1, 1, 4)
    with pytest.raises(InputError, match="mixes positions outside attention"):
        require_packable(convolution)
    with pytest.raises(InputError, match="final_logit_softcapping=30"):
        require_packable(model(final_logit_softcapping=30.0))
