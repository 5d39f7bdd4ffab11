"""Seeded sampling: a draw depends only on (seed, step, prompt, sibling, position) and the token's logits.

A 64-bit counter is hashed (SplitMix64: Steele, Lea and Flood, OOPSLA 2014) to one uniform number for each token. That
number is looked up in the cumulative distribution in two stages: among the sums of cells of neighbouring tokens, then
among the tokens of one cell. This avoids a running sum over the whole vocabulary. Running sums use integers, which are
exact in any order: they are monotone on every device, and the interval of a token of probability zero is empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf import ops
from betterhalf.kernels import fused
from betterhalf.rollout.support import RowSupport, row_support

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NEIGHBOURS = 256
"""Tokens in a cell, whose probabilities are summed for the first stage."""
_WHOLE = 2**52
"""Integer that represents a probability of 1 where probabilities are summed as integers."""

_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Settings that turn the model's distribution into the one sampled from."""

    temperature: float
    """Logits are divided by this first."""
    top_k: int = -1
    """Number of most likely tokens to keep; -1 or 0 for all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens whose probability is at least this share of the largest one."""
    top_tokens: int = 0
    """Number of most likely tokens to report with each draw, unless the distribution is truncated; 0 for none."""
    reports_support: bool = False
    """True if a draw from a truncated distribution comes with the tokens that could be drawn."""

    @property
    def truncated(self) -> bool:
        """True if some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One sampled token for each of B rows."""

    token_ids: Tensor
    """int64 [B]: the sampled tokens."""
    logprobs: Tensor
    """float32 [B]: logprobs in nats under the distribution sampled from."""
    finite: Tensor
    """bool [B]: true where every logit of the row and the logprob are finite."""
    top: tuple[Tensor, Tensor] | None = None
    """int64 and float32 [B, K]: the most likely tokens and their logprobs; None if not wanted."""
    support: RowSupport | None = None
    """Tokens that could be drawn; None unless the distribution is truncated and reports them."""


def _signed(x: int) -> int:
    """Return the int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(x: int) -> int:
    """Apply SplitMix64's finaliser: a bijection of 64 bits; each input bit flips each output bit half of the time."""
    x = ((x ^ (x >> 30)) * _MIX[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MIX[1]) & _MASK
    return x ^ (x >> 31)


def sequence_key(key: tuple[int, int, int], sibling: int, position: int = 0) -> int:
    """Hash (seed, step, prompt) and the sibling to the int64 start of a sequence's stream of random numbers.

    A later `position` skips the numbers before it: `uniforms` of the result at 0 are those of the stream at `position`.
    """
    state = 0
    for part in (*key, sibling):
        state = _mix((state + _GOLDEN + (part & _MASK)) & _MASK)
    return _signed((state + position * _GOLDEN) & _MASK)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 logically; torch's own shift is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Return uniform numbers strictly between 0 and 1, multiples of 2^-53, float64 [B].

    Integer arithmetic wraps, so the result is the same on every device.

    Args:
        keys: int64 [B], from `sequence_key`.
        positions: int64 [B], index of the token in its completion, from 0.
    """
    x = keys + (positions + 1) * _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX[1])
    x = x ^ _shift_right(x, 31)
    return (_shift_right(x, 12).double() + 0.5) * 2.0**-52


def draw_at(logits: Tensor, keys: Tensor, positions: Tensor, wanted: Distribution) -> Draw:
    """Call `draw` with the numbers of `uniforms`; on a GPU in two kernels, unless the distribution is truncated.

    Logprobs are those of the truncated distribution, whose probabilities sum to 1.

    Args:
        logits: float32 [B, V].
        keys: int64 [B], from `sequence_key`.
        positions: int64 [B], index of the token in its completion.
        wanted: distribution to sample from.
    """
    temperature = wanted.temperature
    if wanted.truncated:
        scaled = logits / temperature
        left = truncated(scaled, wanted)
        drawn = draw(left, uniforms(keys, positions), 1.0)
        # Truncation sets the logits of removed tokens to minus infinity, so only the original logits are checked.
        finite = logits.sum(-1).isfinite() & drawn.logprobs.isfinite()
        return replace(drawn, finite=finite, support=row_support(scaled, left) if wanted.reports_support else None)
    if wanted.top_tokens:
        drawn = draw_at(logits, keys, positions, replace(wanted, top_tokens=0))
        return replace(drawn, top=top_logprobs(logits, wanted.top_tokens, temperature))
    if not fused(logits):
        return draw(logits, uniforms(keys, positions), temperature)
    # Imported here because it needs Triton, which only a GPU requires.
    from betterhalf.kernels import vocabulary

    mix = (_GOLDEN, *_MIX)
    token_ids, logprobs, finite = vocabulary.draw(logits, keys, positions, temperature, _NEIGHBOURS, mix)
    return Draw(token_ids=token_ids, logprobs=logprobs, finite=finite)


def top_logprobs(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens of each row and their logprobs, int64 and float32 [B, K], most likely first."""
    values, token_ids = logits.topk(min(count, logits.shape[-1]), dim=-1)
    _, normaliser = ops.normalised(logits, token_ids[:, 0], temperature)
    return token_ids, (values if temperature == 1.0 else values / temperature) - normaliser.unsqueeze(-1)


def truncated(scaled: Tensor, wanted: Distribution) -> Tensor:
    """Set the logits of removed tokens to minus infinity: by `min_p` first, then `top_k`, then `top_p`.

    vLLM uses the same order. Tokens as likely as the last of the `top_k` are kept, and the most likely token always is.

    Args:
        scaled: logits divided by the temperature, float32 [B, V].
        wanted: tokens to keep.
    """
    if wanted.min_p > 0:
        least = scaled.amax(-1, keepdim=True) + math.log(wanted.min_p)
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if 0 < wanted.top_k < scaled.shape[-1]:
        least = scaled.topk(wanted.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if wanted.top_p < 1:
        ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
        # Integer sums are exact in any order, as in `draw`.
        shares = (ranked.double().softmax(-1) * _WHOLE).round().long()
        # Remove the tokens before which more likely ones have already reached `top_p`.
        beyond = shares.cumsum(-1) - shares >= max(1, round(wanted.top_p * _WHOLE))
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return scaled


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Draw:
    """Sample each row of softmax(logits / temperature) by inverting its cumulative distribution.

    Intervals carry the relative error of FP32's exponential, about 2^-24. A token is never drawn if its probability is
    below 2^-53 of the largest in its cell, or if its cell has less than 2^-54 of the largest cell's sum (for 49152
    tokens; 2^(n - 62) in general, where n is the bit length of the number of values summed).

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
    # A sum is finite only if every term is; taking torch's minimum and maximum would be forty times slower.
    finite = scaled.sum(-1).isfinite() & logprobs.isfinite()
    return Draw(token_ids=token_ids, logprobs=logprobs, finite=finite)


def _look_up(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the running sum of weights passes the share `uniform` of the total.

    Args:
        weights: float32 [B, K], not negative, the largest of each row positive.
        uniform: float64 [B], between 0 and 1.

    Returns:
        Index of that weight, int64 [B], and the share of it that is passed, float64 [B], from 0 to 1.
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
