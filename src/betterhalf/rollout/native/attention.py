"""Attention of the engine: causal over prompts, and one token against the slot cache. Grouped queries share their keys.

Scores, softmax and sums are FP32. On a CPU the products are batched matrix products on FP32 operands whose values lie
on the half grid; on a GPU they are torch's fused kernels in half, which also sum in FP32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf.rollout.native.config import DecoderConfig
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.rounding import Rounding

_MAX_SCORES = 2**25
"""FP32 scores of prompts held at once (128 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """What all layers of one decode step share."""

    places: tuple[Tensor, Tensor]
    """int64 [B * kv_heads] each: where the new keys and values go."""
    held: tuple[tuple[Tensor, Tensor], ...]
    """For each layer: keys and values as far as they are attended, [B * kv_heads, attended, D] each."""
    masks: dict[int | None, Tensor]
    """For each sliding window (None: all): what each slot may see. CPU: FP32 [B * kv_heads, 1, attended], 0 or
    -inf. GPU: bool [B, 1, 1, attended]."""


def decode_plan(config: DecoderConfig, cache: KVCache, lengths: Tensor, attended: int) -> DecodePlan:
    """Prepare one token for each of B slots: `lengths` int64 [B] are the tokens already cached."""
    index = torch.arange(attended, device=lengths.device)
    masks: dict[int | None, Tensor] = {}
    for window in set(config.windows):
        visible = index <= lengths[:, None]
        if window is not None:
            visible &= index > lengths[:, None] - window
        masks[window] = _as_mask(visible, config.num_kv_heads)
    held = cache.read(lengths.shape[0], attended)
    return DecodePlan(places=cache.places(lengths), held=held, masks=masks)


def _as_mask(visible: Tensor, kv_heads: int) -> Tensor:
    if visible.is_cuda:
        return visible[:, None, None, :]
    additive = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    return additive.repeat_interleave(kv_heads, 0).unsqueeze(1)


def decode_attention(
    config: DecoderConfig, rounding: Rounding, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """One token of B sequences: q [B, heads, D], keys and values [B * kv_heads, L, D] -> [B, heads * D], rounded."""
    batch, scale = q.shape[0], config.head_dim**-0.5
    if q.is_cuda:
        folded = q.view(batch, config.num_kv_heads, config.group, config.head_dim)
        keys, values = (x.view(batch, -1, *x.shape[1:]).to(q.dtype) for x in (keys, values))
        out = F.scaled_dot_product_attention(
            folded, keys, values, attn_mask=mask.expand(-1, config.num_kv_heads, config.group, -1), scale=scale
        )
        return out.reshape(batch, -1)
    folded = q.float().reshape(-1, config.group, config.head_dim)
    return rounding.round(_attend(rounding, folded, keys, values, mask, scale).view(batch, -1))


def _attend(rounding: Rounding, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(q keys^T * scale + mask) values in FP32: [N, M, D] x [N, L, D] -> [N, M, D]."""
    scores = torch.bmm(q * scale, keys.transpose(1, 2)).add_(mask)
    return torch.bmm(rounding.probabilities(scores.softmax(-1)), values)


def prompt_attention(
    config: DecoderConfig,
    rounding: Rounding,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
) -> Tensor:
    """Causal attention within each prompt: q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads * D], rounded.

    `lengths` sum to T; neighbours of equal length share one call.
    """
    run = _fused_prompts if q.is_cuda else _blocked_prompts
    parts = []
    for start, stop, length in _equal_runs(lengths):
        # [T, heads, D] -> [N, heads, length, D]
        q_N, k_N, v_N = (x[start:stop].view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        parts.append(run(config, rounding, q_N, k_N, v_N, window).transpose(1, 2).flatten(0, 1).flatten(1))
    return rounding.round(torch.cat(parts))


def _equal_runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(first token, token after the last, length) of each run of neighbours of equal length."""
    start = 0
    for length, group in groupby(lengths):
        stop = start + length * sum(1 for _ in group)
        yield start, stop, length
        start = stop


def _fused_prompts(
    config: DecoderConfig, rounding: Rounding, q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> Tensor:
    scale, length = config.head_dim**-0.5, q.shape[2]
    if config.group > 1:
        k, v = (x.repeat_interleave(config.group, 1) for x in (k, v))
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_causal(0, length, window, q.device), scale=scale)


def _causal(start: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """bool [stop - start, stop]: which keys the queries from `start` to `stop` may see."""
    query = torch.arange(start, stop, device=device)[:, None]
    key = torch.arange(stop, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _blocked_prompts(
    config: DecoderConfig, rounding: Rounding, q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> Tensor:
    """[N, heads, L, D] -> same, in FP32: blocks of queries small enough that their scores fit in `_MAX_SCORES`."""
    count, heads, length, dim = q.shape
    keys, values = (x.float().reshape(-1, length, dim) for x in (k, v))
    block = max(1, min(length, _MAX_SCORES // (count * heads * length)))
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        folded = q[:, :, start:stop].float().reshape(keys.shape[0], -1, dim)
        mask = torch.zeros(stop - start, stop).masked_fill_(~_causal(start, stop, window, q.device), float("-inf"))
        out = _attend(rounding, folded, keys[:, :stop], values[:, :stop], mask.repeat(config.group, 1), dim**-0.5)
        parts.append(out.view(count, heads, stop - start, dim))
    return torch.cat(parts, 2)
