"""Decode attention: one new token of each sequence attends over the sequence's slot of the KV cache."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_LAUNCH = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
"""Launch settings for half queries: keys of one iteration (`BLOCK_N`), warps and pipeline stages."""
_LAUNCH_FP32 = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
"""Launch settings for FP32 queries."""
_FEWEST_QUERIES = 16
"""Rows of the smallest tensor core product, to which the queries of a group are padded."""
_MOST_SPLITS = 8
"""Maximum number of programs among which the keys of a sequence are split."""
_LOG2_E = 1.4426950408889634
"""log2(e): softmax is computed with powers of two."""


@triton.jit
def _keys_of(split, length, window, SPLITS: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first key of a program's share, and the end of the share."""
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    last = length
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
        first += split * share
        last = tl.minimum(length, first + share)
    return first, last


@triton.jit
def _attend(
    queries,
    keys,
    values,
    lengths,
    out,
    parts,
    peaks,
    sums,
    scale_log2,
    max_length,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(lengths + pair // KV_HEADS).to(tl.int32) + 1
    first, last = _keys_of(split, length, window, SPLITS, WINDOWED, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    wanted = (m < GROUP)[:, None] & (d < DIM)[None, :]
    place = (pair * GROUP + m)[:, None] * DIM + d[None, :]
    q = tl.load(queries + place, mask=wanted, other=0.0)
    keys += pair * max_length * DIM
    values += pair * max_length * DIM
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < last
        held = seen[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + n[:, None] * DIM + d[None, :], mask=held, other=0.0).to(q.dtype)
        v = tl.load(values + n[:, None] * DIM + d[None, :], mask=held, other=0.0).to(q.dtype)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        qk = tl.where(seen[None, :], qk, float("-inf"))
        higher = tl.maximum(peak, tl.max(qk, 1))
        weights = tl.exp2(qk - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        peak = higher
    if SPLITS == 1:
        tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=wanted)
    else:
        row = (pair * SPLITS + split) * GROUP + m
        tl.store(parts + row[:, None] * DIM + d[None, :], mixed, mask=wanted)
        tl.store(peaks + row, peak, mask=m < GROUP)
        tl.store(sums + row, total, mask=m < GROUP)


@triton.jit
def _join(
    parts,
    peaks,
    sums,
    out,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    row = (pair * SPLITS + s) * GROUP + query
    peak = tl.load(peaks + row, mask=s < SPLITS, other=float("-inf"))
    weight = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(weight * tl.load(sums + row, mask=s < SPLITS, other=0.0), 0)
    held = (s < SPLITS)[:, None] & (d < DIM)[None, :]
    part = tl.load(parts + row[:, None] * DIM + d[None, :], mask=held, other=0.0)
    mixed = tl.sum(weight[:, None] * part, 0) / total
    tl.store(out + (pair * GROUP + query) * DIM + d, mixed.to(out.dtype.element_ty), mask=d < DIM)


def attend(
    queries: Tensor,
    cache: tuple[Tensor, Tensor],
    lengths: Tensor,
    *,
    kv_heads: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return the attention of one token for each of B sequences over its slot of the cache, the token included.

    Only positions that a sequence has are read, however long the cache is. Softmax and sums are FP32; the numerators
    of the softmax are rounded to the queries' dtype before the product with V, as in flash attention (arXiv
    2205.14135). With too few sequences to occupy the device, the keys of each are split among programs (flash
    decoding).

    Args:
        queries: [B, heads, D].
        cache: keys and values, [slots * kv_heads, max_length, D] each, with at least B slots.
        lengths: int64 [B], position of the token.
        kv_heads: number of key heads of a slot.
        scale: factor of q k^T before the softmax.
        window: number of positions that a token sees, including its own; None for all.

    Returns:
        [B, heads * D] in the dtype of `queries`.
    """
    rows, heads, dim = queries.shape
    keys, values = cache
    group, pairs = heads // kv_heads, rows * kv_heads
    splits = _splits(pairs, queries.device)
    out = queries.new_empty(rows, heads * dim)
    shape = (pairs, splits, group) if splits > 1 else (0,)
    parts = torch.empty(*shape, dim, dtype=torch.float32, device=queries.device)
    peaks, sums = torch.empty(2, *shape, dtype=torch.float32, device=queries.device).unbind()
    sizes: dict[str, int] = {"GROUP": group, "DIM": dim, "SPLITS": splits}
    _attend[(pairs, splits)](
        *(queries, keys, values, lengths, out, parts, peaks, sums),
        *(scale * _LOG2_E, keys.shape[1], window or 0),
        **sizes,
        KV_HEADS=kv_heads,
        WINDOWED=window is not None,
        BLOCK_M=max(_FEWEST_QUERIES, triton.next_power_of_2(group)),
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        **(_LAUNCH if queries.element_size() == 2 else _LAUNCH_FP32),
    )
    if splits > 1:
        blocks = {"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_D": triton.next_power_of_2(dim)}
        _join[(pairs, group)](parts, peaks, sums, out, **sizes, **blocks, num_warps=1)
    return out


def _splits(pairs: int, device: torch.device) -> int:
    """Return the number of programs that share the keys of a sequence: enough for about two on each multiprocessor.

    It does not depend on the cache's length, which follows from what was sampled before: that would change sums.
    """
    return max(1, min(2 * _multiprocessors(device) // pairs, _MOST_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
