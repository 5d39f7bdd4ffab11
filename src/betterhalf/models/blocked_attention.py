"""Causal attention in blocks of queries, with its own backward pass, by batched matrix products.

Q K^T, softmax and sums are FP32. torch's fused CPU kernel computes the same, but by small products through MKL, one at
a time: on an AMD processor the blocks take half its time (docs/LOG.md). On a GPU they compute soft-capped scores, which
torch's kernels do not. No quadratic tensor is saved: the backward pass computes each block's probabilities again.

Axes: N segments, each with L queries and K >= L keys; the last query is at the position of the last key. D is the head
dimension. B counts the key heads of all segments. R = L * group counts the queries that share a key head, position by
position with the group's queries of one position adjacent, so that a block of positions is contiguous and no product
copies its operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from betterhalf.ops import bound_, bound_gradient
from betterhalf.precision.products import add_batched_product, batched_product

_QUERIES = 64
"""Query positions of a block: keys beyond its last query are left out, and its Q K^T stays in the processor's cache."""
_MAX_QK = 2**21
"""Maximum number of entries of a block's Q K^T, all heads together; 8 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """Rule that turns products of queries and keys into the scores of the softmax."""

    scale: float
    """Factor of the products."""
    window: int | None = None
    """Maximum number of keys that a query sees, including its own; None for all keys up to its own."""
    cap: float | None = None
    """Soft-cap c: a score x becomes c * tanh(x / c) before keys are hidden (Gemma 2); None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Block of queries of some key heads, with the keys that they may attend to."""

    heads: slice
    """Range of the B key heads."""
    rows: slice
    """Range of the R queries."""
    keys: slice
    """Range of the K keys."""
    count: int
    """Number of query positions."""


def _blocks(shape: torch.Size, group: int, keys: int, window: int | None) -> Iterator[Block]:
    """Yield the blocks that cover queries of shape [B, R, D]."""
    heads, queries = shape[0], shape[1] // group
    before = keys - queries
    for start in range(0, queries, _QUERIES):
        stop = min(start + _QUERIES, queries)
        first = 0 if window is None else max(0, before + start + 1 - window)
        seen, rows = slice(first, before + stop), slice(start * group, stop * group)
        step = max(1, _MAX_QK // ((rows.stop - rows.start) * (seen.stop - seen.start)))
        for head in range(0, heads, step):
            yield Block(heads=slice(head, head + step), rows=rows, keys=seen, count=stop - start)


@lru_cache(maxsize=16)
def _hidden(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return a bool mask [queries, keys], True for keys that a query does not see: later ones, or before its window.

    The last query is at the position of the last key.
    """
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places[None, :]
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _scores(q: Tensor, k: Tensor, count: int, rule: ScoreRule) -> Tensor:
    """Return scores of scaled queries at `count` positions: [B, count * group, D] x [B, K, D] -> [B, count * group, K].

    Those of hidden keys are minus infinity.
    """
    qk, window = bound_(batched_product(q, k.transpose(1, 2)), rule.cap), rule.window
    # Without a window only the last keys can be hidden: those after some query of the block.
    width = min(count, qk.shape[-1]) if window is None else qk.shape[-1]
    qk.view(qk.shape[0], count, -1, qk.shape[-1])[..., -width:].masked_fill_(
        _hidden(count, width, window, qk.device).unsqueeze(1), float("-inf")
    )
    return qk


class BlockedAttention(torch.autograd.Function):
    """q, k, v, rule and operands, as in `blocked_attention`; saves no quadratic tensor."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, operands: torch.dtype) -> Tensor:
        """Attend in blocks of queries."""
        ctx.save_for_backward(q, k, v)
        ctx.rule, ctx.operands = rule, operands
        queries, keys, values = by_key_head(q, k.shape[1], rule.scale), flat(k), flat(v).to(operands)
        out = torch.empty_like(queries)
        for block in _blocks(queries.shape, q.shape[1] // k.shape[1], keys.shape[1], rule.window):
            heads, rows, seen = block.heads, block.rows, block.keys
            p = _scores(queries[heads, rows], keys[heads, seen], block.count, rule).softmax(-1)
            out[heads, rows] = batched_product(p.to(operands), values[heads, seen])
        return by_head(out, q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Compute each block's probabilities again, and from them the gradients of q, k and v."""
        (q, k, v), rule = ctx.saved_tensors, ctx.rule
        queries, keys, values = by_key_head(q, k.shape[1], rule.scale), flat(k), flat(v)
        unscaled, grads = (by_key_head(x, k.shape[1], 1.0) for x in (q, grad_outputs[0]))
        q_operand, k_operand, grad_operand = (x.to(ctx.operands) for x in (unscaled, keys, grads))
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(queries.shape, q.shape[1] // k.shape[1], keys.shape[1], rule.window):
            heads, rows, seen = block.heads, block.rows, block.keys
            scores = _scores(queries[heads, rows], keys[heads, seen], block.count, rule)
            p = scores.softmax(-1)
            grad_p = batched_product(grads[heads, rows], values[heads, seen].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_qk = bound_gradient(grad_scores, scores, rule.cap).to(ctx.operands)
            add_batched_product(grad_v[heads, seen], p.to(ctx.operands).transpose(1, 2), grad_operand[heads, rows])
            add_batched_product(grad_k[heads, seen], grad_qk.transpose(1, 2), q_operand[heads, rows])
            grad_q[heads, rows] = batched_product(grad_qk, k_operand[heads, seen])
        grad_q.mul_(rule.scale), grad_k.mul_(rule.scale)
        return by_head(grad_q, q.shape), grad_k.view(k.shape), grad_v.view(v.shape), None, None


def by_key_head(x: Tensor, kv_heads: int, scale: float) -> Tensor:
    """Scale queries [N, heads, L, D] and group them by key head: contiguous [B, R, D]."""
    count, heads, length, dim = x.shape
    group = heads // kv_heads
    grouped = x.view(count, kv_heads, group, length, dim).transpose(2, 3)
    out = torch.empty((count, kv_heads, length, group, dim), dtype=x.dtype, device=x.device)
    return torch.mul(grouped, scale, out=out).view(-1, length * group, dim)


def by_head(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo the grouping by key head: [B, R, D] -> [N, heads, L, D], a view of contiguous [N, L, heads, D]."""
    count, heads, length, dim = shape
    grouped = x.view(count, -1, length, heads * count // x.shape[0], dim)
    return grouped.transpose(1, 2).reshape(count, length, heads, dim).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """Merge segments and key heads: [N, kv_heads, K, D] -> [B, K, D]."""
    return x.reshape(-1, *x.shape[2:])


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, *, operands: torch.dtype = torch.float32
) -> Tensor:
    """Return softmax(scores) v, where `rule` makes the scores of q k^T, with a causal mask, differentiable.

    Args:
        q: float32 [N, heads, L, D].
        k: float32 [N, kv_heads, K, D]; heads are a multiple of kv_heads.
        v: float32 [N, kv_heads, K, D].
        rule: factor, window and soft-cap.
        operands: format to which the probabilities, and the gradients of q k^T, are rounded before the products that
            sum over them, as in fused half kernels; `q`, `k` and `v` must then hold values of that format. FP32 rounds
            nothing.

    Returns:
        float32 [N, heads, L, D], rounded to `operands` once, as is each block's part of a gradient.
    """
    out = BlockedAttention.apply(q, k, v, rule, operands)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
