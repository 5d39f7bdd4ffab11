"""Seeded sampling: a draw depends on (seed, step, prompt, sibling, position) and the token's logits, on nothing else.

A 64-bit counter is hashed (SplitMix64: Steele, Lea and Flood, OOPSLA 2014) to one uniform number for each token, and
that number is looked up in the cumulative distribution. The distribution is summed in integers, where sums are exact
in any order: it is monotone on every device, and a token of probability zero has an empty interval that nothing hits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.ops import token_logprobs

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One sampled token for each of B rows."""

    token_ids: Tensor
    """int64 [B]."""
    logprobs: Tensor
    """float32 [B], nats, of the distribution sampled from."""
    finite: Tensor
    """bool [B]: every logit of the row, and the logprob, is finite."""


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64 bits in which each input bit flips each output bit half of the time."""
    x = ((x ^ (x >> 30)) * _MIX[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MIX[1]) & _MASK
    return x ^ (x >> 31)


def sequence_key(key: tuple[int, int, int], sibling: int) -> int:
    """Hash (seed, step, prompt) and the sibling to the int64 that starts a sequence's stream of random numbers."""
    state = 0
    for part in (*key, sibling):
        state = _mix((state + _GOLDEN + (part & _MASK)) & _MASK)
    return _signed(state)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers strictly between 0 and 1, multiples of 2^-53: int64 [B] keys and positions -> float64 [B].

    `keys` come from `sequence_key`; `positions` count sampled tokens from 0. Integer arithmetic wraps, so the
    result is the same on every device.
    """
    x = keys + (positions + 1) * _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX[1])
    x = x ^ _shift_right(x, 31)
    return (_shift_right(x, 12).double() + 0.5) * 2.0**-52


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Draw:
    """Sample each row of softmax(logits / temperature) by inverting its cumulative distribution.

    Probabilities are resolved to 2^(bit_length(V) - 62) of the largest one (2^-46 for 49152 tokens): what lies below
    is never drawn. The others carry the relative error of FP32's exponential, about 2^-24.

    Args:
        logits: float32 [B, V].
        uniform: float64 [B], strictly between 0 and 1.
        temperature: positive.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    resolution = 2.0 ** (62 - scaled.shape[-1].bit_length())
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_().mul_(resolution)
    cumulative = weights.long().cumsum_(-1)
    total = cumulative[:, -1]
    target = torch.minimum((uniform * total.double()).long(), total - 1)
    token_ids = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
    token_ids.clamp_(max=scaled.shape[-1] - 1)
    logprobs = token_logprobs(logits, token_ids, temperature)
    # A sum is finite only if every term is; torch's minimum and maximum together take forty times as long.
    finite = scaled.sum(-1).isfinite() & logprobs.isfinite()
    return Draw(token_ids=token_ids, logprobs=logprobs, finite=finite)
