"""Decode step without its matrix products and attention: four kernels for each layer, where torch needs about thirty.

The step has B sequences with one token each. All tensors are contiguous. Values are computed in FP32 and rounded where
`rollout.native.rounding.Rounding` rounds them, to the dtype of the tensor that they are written to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# -- residual stream and norm


@triton.jit
def _add_norm(
    hidden,
    branch,
    weight,
    summed,
    normed,
    width,
    eps,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(hidden + row + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(branch + row + column, mask=inside, other=0.0).to(tl.float32)
        if PARTS > 1:
            size = tl.num_programs(0).to(tl.int64) * width
            for part in tl.static_range(1, PARTS):
                added += tl.load(branch + part * size + row + column, mask=inside, other=0.0)
            added = added.to(summed.dtype.element_ty).to(tl.float32)
        x += added
        x = x.to(summed.dtype.element_ty).to(tl.float32)
        tl.store(summed + row + column, x.to(summed.dtype.element_ty), mask=inside)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    if ALIGNED:
        x = x.to(GRID).to(tl.float32)
    x *= tl.load(weight + column, mask=inside, other=0.0)
    tl.store(normed + row + column, x.to(GRID).to(normed.dtype.element_ty), mask=inside)


def add_norm(
    hidden: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    stream: torch.dtype,
    grid: torch.dtype,
    reader: torch.dtype,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream; return the sum and its RMSNorm.

    Args:
        hidden: residual stream [B, H], half or FP32.
        branch: [B, H] to add, or S partial sums of it, float32 [S, B, H], whose total is first rounded to `stream`;
            None adds nothing.
        weight: float32 [H].
        eps: added to the mean square.
        stream: dtype of the sum.
        grid: dtype to which the norm is rounded.
        reader: dtype in which the norm is returned.
        aligned: also round before the product with the weight.

    Returns:
        [B, H] in `stream` and [B, H] in `reader`.
    """
    rows, width = hidden.shape
    summed = hidden if branch is None else torch.empty_like(hidden, dtype=stream)
    normed = torch.empty_like(hidden, dtype=reader)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        hidden,
        branch,
        weight,
        summed,
        normed,
        width,
        eps,
        PARTS=0 if branch is None else 1 if branch.dim() == 2 else branch.shape[0],
        ALIGNED=aligned,
        GRID=getattr(tl, str(grid).removeprefix("torch.")),
        BLOCK=block,
        num_warps=_warps(block),
    )
    return summed, normed


# -- rope and cache


@triton.jit
def _rotate_and_append(
    heads,
    cos,
    sin,
    lengths,
    query_norm,
    key_norm,
    queries,
    keys,
    values,
    max_length,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    NORMED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < DIM
    grid = heads.dtype.element_ty
    position = tl.load(lengths + row)
    source = heads + (row * (QUERIES + 2 * KEYS) + head) * DIM
    x = tl.load(source + d, mask=inside, other=0.0)
    if head >= QUERIES + KEYS:
        place = (row * KEYS + head - QUERIES - KEYS) * max_length + position
        tl.store(values + place * DIM + d, x.to(values.dtype.element_ty), mask=inside)
    else:
        partner = tl.where(d < DIM // 2, d + DIM // 2, d - DIM // 2)
        x = x.to(tl.float32)
        y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            scale = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
            x *= scale
            y *= scale
            if ALIGNED:
                x = x.to(grid).to(tl.float32)
                y = y.to(grid).to(tl.float32)
            weight = query_norm
            if head >= QUERIES:
                weight = key_norm
            x = (x * tl.load(weight + d, mask=inside, other=0.0)).to(grid).to(tl.float32)
            y = (y * tl.load(weight + partner, mask=inside, other=0.0)).to(grid).to(tl.float32)
        x *= tl.load(cos + position * DIM + d, mask=inside, other=0.0)
        y *= tl.load(sin + position * DIM + d, mask=inside, other=0.0)
        if ALIGNED:
            x = x.to(grid).to(tl.float32)
            y = y.to(grid).to(tl.float32)
        x = (x + y).to(grid)
        if head < QUERIES:
            tl.store(queries + (row * QUERIES + head) * DIM + d, x, mask=inside)
        else:
            place = (row * KEYS + head - QUERIES) * max_length + position
            tl.store(keys + place * DIM + d, x.to(keys.dtype.element_ty), mask=inside)


def rotate_and_append(
    heads: Tensor,
    rope: tuple[Tensor, Tensor],
    lengths: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cache: tuple[Tensor, Tensor],
    eps: float,
    *,
    kv_heads: int,
    aligned: bool,
) -> Tensor:
    """Norm and rotate queries and keys, and write the new keys and values to the cache, rounded to its dtype.

    Args:
        heads: queries, keys and values of one token each, [B, heads + 2 kv_heads, D].
        rope: cosine and signed sine of every position, float32 [positions, 1, D].
        lengths: int64 [B], number of tokens in the cache, which is the new token's position.
        norms: float32 [D] weights of the RMSNorm of queries and of keys, or None without norms.
        cache: keys and values, [slots * kv_heads, max_length, D] each, with at least B slots; written in place.
        eps: added to the mean square in the norms.
        kv_heads: number of key heads of a slot.
        aligned: also round norms before the product with the weight, and products of rope before their sum.

    Returns:
        Rotated queries [B, heads, D] in the dtype of `heads`.
    """
    rows, count, dim = heads.shape
    keys, values = cache
    queries = heads.new_empty(rows, count - 2 * kv_heads, dim)
    query_norm, key_norm = norms or (rope[0], rope[0])
    _rotate_and_append[(rows, count)](
        heads,
        *rope,
        lengths,
        query_norm,
        key_norm,
        queries,
        keys,
        values,
        keys.shape[1],
        eps,
        QUERIES=queries.shape[1],
        KEYS=kv_heads,
        DIM=dim,
        NORMED=norms is not None,
        ALIGNED=aligned,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return queries


# -- SwiGLU


@triton.jit
def _swiglu(gate_up, out, width, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grid = out.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    gate = gate / (1.0 + tl.exp(-gate))
    if ALIGNED:
        gate = gate.to(grid).to(tl.float32)
    tl.store(out + row * width + column, (gate * up).to(grid), mask=inside)


def swiglu(gate_up: Tensor, *, aligned: bool) -> Tensor:
    """Return silu(gate) * up: [B, 2 * width] -> [B, width] in the same dtype; `aligned` also rounds silu(gate)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = 1024
    _swiglu[(rows, triton.cdiv(width, block))](gate_up, out, width, ALIGNED=aligned, BLOCK=block, num_warps=4)
    return out


def _warps(block: int) -> int:
    """Return the number of warps for a program that holds one row of `block` numbers."""
    return min(8, max(1, block // 256))
