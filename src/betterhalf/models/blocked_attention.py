"""Causal attention on a CPU in blocks of queries, with an own backward pass, by batched matrix products.

Scores, softmax and sums are FP32. torch's fused kernel does the same on a CPU, but through MKL, one small product at a
time: on an AMD processor the blocks take half its time (docs/LOG.md). Nothing quadratic is kept: the backward pass
makes each block's probabilities again.

Axes: N segments, L queries and K >= L keys of each; the last query sees the last key. D is the head's width. B counts
the key heads of all segments, and R = L * group the queries that meet one: position by position, those of one position
side by side, so that a block of positions is one piece of memory and no product copies its operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from betterhalf.precision.products import add_batched_product, batched_product

_QUERIES = 64
"""Of a block: keys beyond its last query are left out, and its scores stay in the processor's cache."""
_SCORES = 2**21
"""Scores of a block, all heads together; 8 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some queries of some key heads, and the keys they may see."""

    heads: slice
    """Of B."""
    rows: slice
    """Of R."""
    keys: slice
    count: int
    """Positions."""


def _blocks(shape: torch.Size, group: int, keys: int, window: int | None) -> Iterator[Block]:
    """All blocks of queries of shape [B, R, D]."""
    heads, queries = shape[0], shape[1] // group
    before = keys - queries
    for start in range(0, queries, _QUERIES):
        stop = min(start + _QUERIES, queries)
        first = 0 if window is None else max(0, before + start + 1 - window)
        seen, rows = slice(first, before + stop), slice(start * group, stop * group)
        step = max(1, _SCORES // ((rows.stop - rows.start) * (seen.stop - seen.start)))
        for head in range(0, heads, step):
            yield Block(heads=slice(head, head + step), rows=rows, keys=seen, count=stop - start)


@lru_cache(maxsize=16)
def _hidden(queries: int, keys: int, window: int | None) -> Tensor:
    """bool [queries, keys]: keys after a query, or further back than the window; the last query sees the last key."""
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)[None, :]
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _probabilities(q: Tensor, k: Tensor, count: int, window: int | None) -> Tensor:
    """softmax(q k^T) for `count` positions: [B, count * group, D] x [B, K, D] -> [B, count * group, K]."""
    scores = batched_product(q, k.transpose(1, 2))
    # Only the last keys lie after some query; a window can hide any.
    width = min(count, scores.shape[-1]) if window is None else scores.shape[-1]
    scores.view(scores.shape[0], count, -1, scores.shape[-1])[..., -width:].masked_fill_(
        _hidden(count, width, window).unsqueeze(1), float("-inf")
    )
    return scores.softmax(-1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, operands: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window, ctx.operands = scale, window, operands
        queries, keys, values = _by_key_head(q, k.shape[1], scale), _flat(k), _flat(v).to(operands)
        out = torch.empty_like(queries)
        for block in _blocks(queries.shape, q.shape[1] // k.shape[1], keys.shape[1], window):
            heads, rows, seen = block.heads, block.rows, block.keys
            p = _probabilities(queries[heads, rows], keys[heads, seen], block.count, window)
            out[heads, rows] = batched_product(p.to(operands), values[heads, seen])
        return _by_head(out, q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        queries, keys, values = _by_key_head(q, k.shape[1], ctx.scale), _flat(k), _flat(v)
        unscaled, grads = (_by_key_head(x, k.shape[1], 1.0) for x in (q, grad_outputs[0]))
        q_operand, k_operand, grad_operand = (x.to(ctx.operands) for x in (unscaled, keys, grads))
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(queries.shape, q.shape[1] // k.shape[1], keys.shape[1], ctx.window):
            heads, rows, seen = block.heads, block.rows, block.keys
            p = _probabilities(queries[heads, rows], keys[heads, seen], block.count, ctx.window)
            grad_p = batched_product(grads[heads, rows], values[heads, seen].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype).to(ctx.operands)
            add_batched_product(grad_v[heads, seen], p.to(ctx.operands).transpose(1, 2), grad_operand[heads, rows])
            add_batched_product(grad_k[heads, seen], grad_scores.transpose(1, 2), q_operand[heads, rows])
            grad_q[heads, rows] = batched_product(grad_scores, k_operand[heads, seen])
        grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale)
        return _by_head(grad_q, q.shape), grad_k.view(k.shape), grad_v.view(v.shape), None, None, None


def _by_key_head(x: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Queries [N, heads, L, D], scaled, with those that meet a key head together: contiguous [B, R, D]."""
    count, heads, length, dim = x.shape
    group = heads // kv_heads
    apart = x.view(count, kv_heads, group, length, dim).transpose(2, 3)
    out = torch.empty((count, kv_heads, length, group, dim), dtype=x.dtype)
    return torch.mul(apart, scale, out=out).view(-1, length * group, dim)


def _by_head(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse: [B, R, D] -> [N, heads, L, D], a view of contiguous [N, L, heads, D]."""
    count, heads, length, dim = shape
    apart = x.view(count, -1, length, heads * count // x.shape[0], dim)
    return apart.transpose(1, 2).reshape(count, length, heads, dim).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[N, kv_heads, K, D] -> [B, K, D]."""
    return x.reshape(-1, *x.shape[2:])


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, operands: torch.dtype = torch.float32
) -> Tensor:
    """Differentiable softmax(q k^T * scale) v with a causal mask.

    Args:
        q: float32 [N, heads, L, D].
        k: float32 [N, kv_heads, K, D]; heads are a multiple of kv_heads.
        v: float32 [N, kv_heads, K, D].
        scale: of the scores.
        window: how many keys a query sees at most, itself included; None for all before it.
        operands: what the probabilities, and the gradients of the scores, are rounded to before the products that sum
            over them, as fused half kernels do; `q`, `k` and `v` must then have values of that format. FP32 rounds
            nothing.

    Returns:
        float32 [N, heads, L, D]; rounded to `operands` once, likewise each block's share of a gradient.
    """
    out = _BlockedAttention.apply(q, k, v, scale, window, operands)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
