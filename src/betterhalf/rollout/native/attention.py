"""Attention of the native engine: causal over prompts, and one token against the slot cache. Queries may be grouped.

Scores, softmax and sums are FP32. On a CPU the products are batched matrix products on FP32 operands whose values are
on the half grid. On a GPU they are fused kernels in half, which also sum in FP32: torch's kernel over prompts, and our
own over the cache, because torch's would read every slot to its end, and need a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf.models.blocked_attention import ScoreRule
from betterhalf.models.tiled_attention import KEYS, by_tile, decode_tiles, tiled_attention
from betterhalf.ops import bound_
from betterhalf.rollout.native.config import DecoderConfig
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.rounding import Rounding

_MAX_SCORES = 2**25
"""FP32 scores of prompts held at once (128 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Tensors that all layers of one decode step share."""

    places: tuple[Tensor, Tensor]
    """Indices of the new keys and values in the cache (head, position), int64 [B * kv_heads] each."""
    lengths: Tensor
    """int64 [B]: tokens in each slot before the new one."""
    held: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer: on a CPU the attended positions, [B * kv_heads, attended, D] each; on a GPU the
    whole cache."""
    masks: dict[int | None, Tensor]
    """On a CPU: sliding window (None without one) -> additive mask, FP32 [B * kv_heads, 1, attended], 0 where a
    position is visible and -inf elsewhere, or for tiles the mask that `decode_tiles` takes; empty on a GPU."""


def decode_plan(
    config: DecoderConfig, rounding: Rounding, cache: KVCache, lengths: Tensor, attended: int
) -> DecodePlan:
    """Prepare a decode step of one token for each of B slots.

    Args:
        config: sizes of the decoder.
        rounding: rounding outside FP32 islands.
        cache: holds B slots or more.
        lengths: tokens already cached in each slot, int64 [B].
        attended: number of cached positions to read on a CPU, above every length.
    """
    masks: dict[int | None, Tensor] = {}
    if lengths.is_cuda:
        whole = tuple(cache.rows(layer) for layer in range(config.num_layers))
        return DecodePlan(places=cache.places(lengths), lengths=lengths, held=whole, masks=masks)
    if rounding.tiled:
        attended = -(-attended // KEYS) * KEYS
    index = torch.arange(attended)
    for window in set(config.windows):
        visible = index <= lengths[:, None]
        if window is not None:
            visible &= index > lengths[:, None] - window
        masks[window] = _as_mask(visible, config.num_kv_heads, tiled=rounding.tiled)
    held = cache.read(lengths.shape[0], attended)
    return DecodePlan(places=cache.places(lengths), lengths=lengths, held=held, masks=masks)


def _as_mask(visible: Tensor, kv_heads: int, *, tiled: bool) -> Tensor:
    if tiled:
        return by_tile(~visible.repeat_interleave(kv_heads, 0))
    additive = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    return additive.repeat_interleave(kv_heads, 0).unsqueeze(1)


def decode_attention(config: DecoderConfig, rounding: Rounding, layer: int, q: Tensor, plan: DecodePlan) -> Tensor:
    """Attend from one token of each of B sequences, whose keys and values are already in the cache.

    Args:
        config: sizes of the decoder.
        rounding: rounding of this layer's attention.
        layer: index of the layer.
        q: queries [B, heads, D].
        plan: the decode step.

    Returns:
        Rounded results [B, heads * D].
    """
    (keys, values), rule = plan.held[layer], config.score_rule(layer)
    if q.is_cuda:
        return gpu_attention(config, q.contiguous(), (keys, values), plan.lengths, rule.window)
    folded, mask = q.float().reshape(-1, config.group, config.head_dim), plan.masks[rule.window]
    if rounding.tiled:
        mixed = decode_tiles(folded * rule.scale, keys, values, mask, rule.cap)
    else:
        mixed = _attend(rounding, folded, keys, values, mask, rule)
    return rounding.round(mixed.reshape(q.shape[0], -1))


def gpu_attention(
    config: DecoderConfig, q: Tensor, held: tuple[Tensor, Tensor], lengths: Tensor, window: int | None
) -> Tensor:
    """Compute `decode_attention` in one kernel on a GPU.

    Args:
        config: sizes of the decoder.
        q: contiguous queries [B, heads, D].
        held: the layer's keys and values, as in `DecodePlan.held`.
        lengths: tokens in each slot before the new one, int64 [B].
        window: sliding window; None without one.

    Returns:
        [B, heads * D].
    """
    # Imported here because it needs Triton, which only a GPU requires.
    from betterhalf.kernels.attention import attend

    return attend(q, held, lengths, kv_heads=config.num_kv_heads, scale=config.attention_scale, window=window)


def _attend(rounding: Rounding, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: ScoreRule) -> Tensor:
    """Compute softmax(scores + mask) values in FP32: [N, M, D] x [N, L, D] -> [N, M, D]."""
    scores = bound_(torch.bmm(q * rule.scale, keys.transpose(1, 2)), rule.cap).add_(mask)
    return torch.bmm(rounding.probabilities(scores.softmax(-1)), values)


def prompt_attention(
    config: DecoderConfig,
    rounding: Rounding,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    layer: int,
) -> Tensor:
    """Attend causally within each prompt; neighbours of equal length share one call.

    Args:
        config: sizes of the decoder.
        rounding: rounding of this layer's attention.
        q: queries [T, heads, D].
        k: keys [T, kv_heads, D].
        v: values [T, kv_heads, D].
        lengths: tokens of each prompt; they sum to T.
        layer: index of the layer.

    Returns:
        Rounded results [T, heads * D].
    """
    run = _fused_prompts if q.is_cuda else _tiled_prompts if rounding.tiled else _blocked_prompts
    parts, rule = [], config.score_rule(layer)
    for start, stop, length in _equal_runs(lengths):
        # [T, heads, D] -> [N, heads, length, D]
        q_N, k_N, v_N = (x[start:stop].view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        parts.append(run(rounding, q_N, k_N, v_N, rule).transpose(1, 2).flatten(0, 1).flatten(1))
    return rounding.round(torch.cat(parts))


def _equal_runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield (first token, token after the last, length) of each run of neighbours of equal length."""
    start = 0
    for length, group in groupby(lengths):
        stop = start + length * sum(1 for _ in group)
        yield start, stop, length
        start = stop


def _fused_prompts(_rounding: Rounding, q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> Tensor:
    scale, window, length = rule.scale, rule.window, q.shape[2]
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_causal(0, length, window, q.device), scale=scale)


def _tiled_prompts(_rounding: Rounding, q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> Tensor:
    return tiled_attention(q.float(), k.float(), v.float(), rule)


def _causal(start: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """Return bool [stop - start, stop], true where a query from `start` to `stop` may see a key."""
    query = torch.arange(start, stop, device=device)[:, None]
    key = torch.arange(stop, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _blocked_prompts(rounding: Rounding, q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> Tensor:
    """Attend in FP32, [N, heads, L, D] -> same, in blocks of queries whose scores fit in `_MAX_SCORES`."""
    count, heads, length, dim = q.shape
    keys, values = (x.float().reshape(-1, length, dim) for x in (k, v))
    block = max(1, min(length, _MAX_SCORES // (count * heads * length)))
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        folded = q[:, :, start:stop].float().reshape(keys.shape[0], -1, dim)
        mask = torch.zeros(stop - start, stop).masked_fill_(~_causal(start, stop, rule.window, q.device), float("-inf"))
        mask = mask.repeat(heads // k.shape[1], 1)
        out = _attend(rounding, folded, keys[:, :stop], values[:, :stop], mask, rule)
        parts.append(out.view(count, heads, stop - start, dim))
    return torch.cat(parts, 2)
