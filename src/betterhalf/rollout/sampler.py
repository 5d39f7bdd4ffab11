"""Seeded sampling: a draw depends on (seed, step, prompt, sibling, position) and the token's logits, on nothing else.

A 64-bit counter is hashed (SplitMix64: Steele, Lea and Flood, OOPSLA 2014) to one uniform number for each token, and
that number is looked up in the cumulative distribution: first among sums of neighbouring tokens, then among the tokens
of one such sum, which spares a running sum over the vocabulary. Running sums are taken in integers, where they are
exact in any order: monotone on every device, and a token of probability zero has an empty interval that nothing hits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf import ops
from betterhalf.kernels import fused

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NEIGHBOURS = 256
"""Tokens whose probabilities are summed up for the first look."""
_WHOLE = 2**52
"""Stands for a probability of 1 where probabilities are added up as integers."""

_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """The part of the model's distribution that is sampled from."""

    temperature: float
    """Logits are divided by this first."""
    top_k: int = -1
    """Number of the likeliest tokens that stay; -1 or 0 for all."""
    top_p: float = 1.0
    """The likeliest tokens stay that together reach this probability."""
    min_p: float = 0.0
    """Tokens stay that are at least this share as likely as the likeliest."""

    @property
    def truncated(self) -> bool:
        """True if some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


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


def draw_at(logits: Tensor, keys: Tensor, positions: Tensor, wanted: Distribution) -> Draw:
    """`draw` with the uniform numbers of `uniforms`; on a GPU in two kernels, unless the distribution is truncated.

    Logprobs are those of the truncated distribution, whose probabilities sum to 1.
    """
    temperature = wanted.temperature
    if wanted.truncated:
        drawn = draw(truncated(logits / temperature, wanted), uniforms(keys, positions), 1.0)
        # The tokens that were cut off have logits of minus infinity by intent.
        return replace(drawn, finite=logits.sum(-1).isfinite() & drawn.logprobs.isfinite())
    if not fused(logits):
        return draw(logits, uniforms(keys, positions), temperature)
    # Imported here: only where there is a GPU does it need Triton.
    from betterhalf.kernels import vocabulary

    mix = (_GOLDEN, *_MIX)
    token_ids, logprobs, finite = vocabulary.draw(logits, keys, positions, temperature, _NEIGHBOURS, mix)
    return Draw(token_ids=token_ids, logprobs=logprobs, finite=finite)


def truncated(scaled: Tensor, wanted: Distribution) -> Tensor:
    """Logits with minus infinity where a token is cut off: by `min_p`, of the rest by `top_k`, of that by `top_p`.

    That is vLLM's order. Tokens as likely as the last of the `top_k` stay; the likeliest token always does.

    Args:
        scaled: float32 [B, V], divided by the temperature.
        wanted: what stays.
    """
    if wanted.min_p > 0:
        least = scaled.amax(-1, keepdim=True) + math.log(wanted.min_p)
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if 0 < wanted.top_k < scaled.shape[-1]:
        least = scaled.topk(wanted.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if wanted.top_p < 1:
        ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
        # Integers, whose sums are exact in any order, as in `draw`.
        shares = (ranked.double().softmax(-1) * _WHOLE).round().long()
        # Cut off are those before which the likelier ones have reached `top_p` already.
        beyond = shares.cumsum(-1) - shares >= round(wanted.top_p * _WHOLE)
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return scaled


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Draw:
    """Sample each row of softmax(logits / temperature) by inverting its cumulative distribution.

    Intervals carry the relative error of FP32's exponential, about 2^-24. Never drawn is a token whose probability is
    below 2^-53 of the largest among its neighbours, or whose neighbours together have less than 2^-54 of the largest
    sum of neighbours (for 49152 tokens; 2^(bit_length - 62) of so many numbers in general).

    Args:
        logits: float32 [B, V].
        uniform: float64 [B], strictly between 0 and 1.
        temperature: positive.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    weights, largest = ops.shifted_exp(scaled)
    (rows, vocabulary), missing = weights.shape, -weights.shape[1] % _NEIGHBOURS
    cells = (F.pad(weights, (0, missing)) if missing else weights).view(rows, -1, _NEIGHBOURS)
    cell, within = _look_up(cells.sum(-1), uniform)
    index, _ = _look_up(cells[torch.arange(rows, device=cells.device), cell], within)
    token_ids = (cell * _NEIGHBOURS + index).clamp_(max=vocabulary - 1)
    logprobs = ops.chosen(scaled, token_ids) - ops.log_normaliser(weights, largest)
    # A sum is finite only if every term is; torch's minimum and maximum together take forty times as long.
    finite = scaled.sum(-1).isfinite() & logprobs.isfinite()
    return Draw(token_ids=token_ids, logprobs=logprobs, finite=finite)


def _look_up(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of weights passes `uniform` of the total, and how far into that weight, of 1.

    Args:
        weights: float32 [B, K], not negative, the largest of each row positive.
        uniform: float64 [B], between 0 and 1.

    Returns:
        int64 [B] and float64 [B].
    """
    wide, count = weights.double(), weights.shape[-1]
    shares = (wide * (2.0 ** (62 - count.bit_length()) / wide.amax(-1, keepdim=True))).long()
    running = shares.cumsum(-1)
    total = running[:, -1]
    exact = uniform * total.double()
    target = torch.minimum(exact.long(), total - 1)
    index = torch.searchsorted(running, target.unsqueeze(-1), right=True).clamp_(max=count - 1)
    share, end = shares.gather(-1, index).squeeze(-1), running.gather(-1, index).squeeze(-1)
    within = (exact - (end - share).double()) / share.double()
    return index.squeeze(-1), within.clamp(0.0, 1.0)
