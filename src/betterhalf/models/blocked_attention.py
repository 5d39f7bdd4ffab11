"""Causal attention on a CPU in blocks of queries, with an own backward pass, by batched matrix products.

Scores, softmax and sums are FP32. torch's fused kernel does the same on a CPU, but through MKL, one small product at a
time: on an AMD processor the blocks take half its time (docs/LOG.md). Nothing quadratic is kept: the backward pass
makes each block's probabilities again.

Axes: N segments, L queries and K >= L keys of each; the last query sees the last key. D is the head's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from betterhalf.precision.products import batched_product

_QUERIES = 64
"""Of a block: keys beyond its last query are left out, and its scores stay in the processor's cache."""
_SCORES = 2**21
"""Scores of a block, all heads together; 8 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some queries of some key heads, and the keys they may see."""

    heads: slice
    """Of N * kv_heads."""
    queries: slice
    keys: slice


def _blocks(q: Tensor, keys: int, window: int | None) -> Iterator[Block]:
    """All blocks of q [N * kv_heads, group, L, D], whose query heads of a group share a key head."""
    heads, group, queries = q.shape[:3]
    before = keys - queries
    for start in range(0, queries, _QUERIES):
        stop = min(start + _QUERIES, queries)
        first = 0 if window is None else max(0, before + start + 1 - window)
        seen = slice(first, before + stop)
        step = max(1, _SCORES // (group * (stop - start) * (seen.stop - seen.start)))
        for head in range(0, heads, step):
            yield Block(heads=slice(head, head + step), queries=slice(start, stop), keys=seen)


@lru_cache(maxsize=16)
def _hidden(queries: int, keys: int, window: int | None) -> Tensor:
    """bool [queries, keys]: keys after a query, or further back than the window; the last query sees the last key."""
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)[None, :]
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _probabilities(q: Tensor, k: Tensor, count: int, window: int | None) -> Tensor:
    """softmax(q k^T) of `count` queries of each head in a group: [B, group * count, D] x [B, K, D] -> [B, ..., K]."""
    scores = batched_product(q, k.transpose(1, 2))
    # Only the last keys lie after some query; a window can hide any.
    width = min(count, scores.shape[-1]) if window is None else scores.shape[-1]
    scores.view(scores.shape[0], -1, count, scores.shape[-1])[..., -width:].masked_fill_(
        _hidden(count, width, window), float("-inf")
    )
    return scores.softmax(-1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, operands: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window, ctx.operands = scale, window, operands
        queries, keys, values = _by_key_head(q, k.shape[1], scale), _flat(k), _flat(v)
        values = values.to(operands)
        out = torch.empty_like(queries)
        for block in _blocks(queries, keys.shape[1], window):
            rows = queries[block.heads, :, block.queries]
            p = _probabilities(_rows(rows), keys[block.heads, block.keys], rows.shape[2], window)
            product = batched_product(p.to(operands), values[block.heads, block.keys])
            out[block.heads, :, block.queries] = product.view(rows.shape)
        return out.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        queries, keys, values = _by_key_head(q, k.shape[1], ctx.scale), _flat(k), _flat(v)
        unscaled, grads = (_by_key_head(x, k.shape[1], 1.0) for x in (q, grad_outputs[0]))
        q_operand, k_operand, grad_operand = (x.to(ctx.operands) for x in (unscaled, keys, grads))
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(queries, keys.shape[1], ctx.window):
            heads, rows, seen = block.heads, block.queries, block.keys
            count = rows.stop - rows.start
            p = _probabilities(_rows(queries[heads, :, rows]), keys[heads, seen], count, ctx.window)
            grad_p = batched_product(_rows(grads[heads, :, rows]), values[heads, seen].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype).to(ctx.operands)
            p = p.to(ctx.operands)
            grad_v[heads, seen] += batched_product(p.transpose(1, 2), _rows(grad_operand[heads, :, rows]))
            grad_k[heads, seen] += batched_product(grad_scores.transpose(1, 2), _rows(q_operand[heads, :, rows]))
            share = batched_product(grad_scores, k_operand[heads, seen])
            grad_q[heads, :, rows] = share.view(share.shape[0], -1, count, share.shape[-1])
        grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale)
        return grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape), None, None, None


def _by_key_head(x: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Queries [N, heads, L, D], scaled, with those that share a key head together: [N * kv_heads, group, L, D]."""
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.mul(x, scale, out=out)
    return out.view(x.shape[0] * kv_heads, -1, *x.shape[2:])


def _flat(x: Tensor) -> Tensor:
    """[N, kv_heads, K, D] -> [N * kv_heads, K, D]."""
    return x.reshape(-1, *x.shape[2:])


def _rows(x: Tensor) -> Tensor:
    """[B, group, L, D] -> [B, group * L, D]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


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
