"""Attention on a CPU in which a query's bits depend on its own sequence alone, for `engine.rounding = "exact"`.

Prompts, decode steps and packs call it, for the trainer and for the native engine. Every product has one fixed shape:
queries are padded to a block, keys to whole tiles of absolute positions. The maximum is taken over all keys at once,
and the tiles' sums are added in the order of their positions, so a tile of hidden keys adds an exact zero.

Axes: B counts the key heads of all sequences, R = L * group the queries that share a key head, position by position. D
is the head dimension; K keys are padded to J tiles of `KEYS` positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf.errors import InputError
from betterhalf.models.blocked_attention import BlockedAttention, ScoreRule, by_head, by_key_head, flat
from betterhalf.ops import bound_
from betterhalf.precision.products import batched_product

KEYS = 64
"""Positions of a tile."""
_FEW, _MANY = 8, 64
"""Queries of a block: of a decode step, and of anything longer."""
_NARROWEST = 16
"""Smallest head dimension of a product: narrower heads are padded, because torch computes tiny products differently."""
_MAX_SCORES = 2**20
"""Maximum number of scores of a block, all heads together; 4 MiB."""


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> Tensor:
    """Return softmax(scores) v with a causal mask, differentiable; see `blocked_attention`.

    The gradients are those of `blocked_attention`.
    """
    out = _TiledAttention.apply(q, k, v, rule, torch.float32)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _TiledAttention(BlockedAttention):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, operands: torch.dtype) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rule, ctx.operands = rule, operands
        queries, group, window = by_key_head(q, k.shape[1], rule.scale), q.shape[1] // k.shape[1], rule.window
        keys, values = (_whole_tiles(flat(x)) for x in (k, v))
        out, before = torch.empty_like(queries), k.shape[2] - q.shape[2]
        for rows in _row_blocks(queries.shape[1], queries.shape[2]):
            first, last = before + rows.start // group, before + (rows.stop - 1) // group
            start = 0 if window is None else max(0, first + 1 - window) // KEYS * KEYS
            seen = slice(start, (last // KEYS + 1) * KEYS)
            hidden = _hidden(rows.start, rows.stop, group, before, seen.start, seen.stop, window)
            for heads in _head_blocks(queries.shape[0], (rows.stop - rows.start) * (seen.stop - seen.start)):
                block = queries[heads, rows]
                out[heads, rows] = _attend(block, keys[heads, seen], values[heads, seen], hidden, rule.cap)
        return by_head(out, q.shape)


def decode_tiles(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, cap: float | None = None) -> Tensor:
    """Attend from one position of each of B key heads; not differentiable.

    Args:
        q: scaled queries, float32 [B, group, D].
        keys: float32 [B, J * KEYS, D]; those that are hidden must be finite.
        values: float32 [B, J * KEYS, D]; those that are hidden must be finite.
        hidden: bool [J, B, 1, KEYS], True for keys that a head does not see.
        cap: soft-cap of the scores; None without one.

    Returns:
        float32 [B, group, D].
    """
    blocks = _row_blocks(q.shape[1], q.shape[2])
    parts = [_attend(q[:, rows], keys, values, hidden, cap) for rows in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def by_tile(hidden: Tensor) -> Tensor:
    """Split the keys of a mask into tiles: bool [B, J * KEYS] -> [J, B, 1, KEYS]."""
    return hidden.view(hidden.shape[0], -1, 1, KEYS).transpose(0, 1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, cap: float | None) -> Tensor:
    """Attend to whole tiles: q [B, R, D], keys and values [B, J * KEYS, D], hidden [J, 1 or B, 1 or R, KEYS]."""
    _, rows, dim = q.shape
    missing = _block_size(rows, dim) - rows
    if dim < _NARROWEST:
        q, keys, values = (F.pad(x, (0, _NARROWEST - dim)) for x in (q, keys, values))
    if missing:
        q = F.pad(q, (0, 0, 0, missing))
        hidden = hidden if hidden.shape[2] == 1 else F.pad(hidden, (0, 0, 0, missing))
    scores = torch.stack([batched_product(q, tile.transpose(1, 2)) for tile in torch.split(keys, KEYS, 1)])
    bound_(scores, cap).masked_fill_(hidden, float("-inf"))
    weights = scores.sub_(scores.amax((0, 3), keepdim=True)).exp_()
    total, mixed = torch.zeros_like(q[..., 0]), torch.zeros_like(q)
    for weight, tile in zip(weights, torch.split(values, KEYS, 1), strict=True):
        total += weight.sum(-1)
        mixed += batched_product(weight, tile)
    return mixed.div_(total.unsqueeze(-1))[:, :rows, :dim]


def _whole_tiles(x: Tensor) -> Tensor:
    """Pad keys or values [B, K, D] with zeros to whole tiles."""
    missing = -x.shape[1] % KEYS
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


@lru_cache(maxsize=256)
def _hidden(row: int, last_row: int, group: int, before: int, key: int, last_key: int, window: int | None) -> Tensor:
    """Return the causal mask of a block of queries and of tiles from `key` to `last_key`, bool [J, 1, R, KEYS]."""
    positions = before + torch.arange(row, last_row) // group
    distance = positions[:, None] - torch.arange(key, last_key)[None, :]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return hidden.view(hidden.shape[0], 1, -1, KEYS).permute(2, 1, 0, 3)


def _row_blocks(rows: int, dim: int) -> Iterator[slice]:
    size = _block_size(rows, dim)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _head_blocks(heads: int, scores: int) -> Iterator[slice]:
    step = max(1, _MAX_SCORES // scores)
    return (slice(start, start + step) for start in range(0, heads, step))


def _block_size(rows: int, dim: int) -> int:
    """Return the size of the blocks that compute this number of queries."""
    sizes = block_sizes(dim, torch.get_num_threads())
    return sizes[0] if rows <= _FEW else sizes[-1]


@cache
def block_sizes(dim: int, threads: int) -> tuple[int, ...]:
    """Return the block sizes that give the same bits for heads of this dimension, in ascending order.

    Args:
        dim: head dimension, D.
        threads: number of threads that compute; it may change the order of sums.

    Raises:
        InputError: a query's bits depend on its place or on its neighbours.
    """
    width = max(dim, _NARROWEST)
    found = _trial(width, _FEW)
    if not all(torch.equal(_trial(width, _FEW, shift, heads), found) for shift, heads in ((3, _HEADS), (0, 1))):
        raise InputError(
            "engine.rounding=exact needs batched products whose rows do not depend on each other, and this "
            f"processor's do for heads of dimension {dim}; set engine.rounding=aligned"
        )
    return (_FEW, _MANY) if torch.equal(_trial(width, _MANY), found) else (_FEW,)


_HEADS = 6
"""Key heads of a trial."""


def _trial(dim: int, size: int, shift: int = 0, heads: int = _HEADS) -> Tensor:
    """Compute both products of a tile for random queries.

    Args:
        dim: head dimension, padded.
        size: queries of a product.
        shift: distance by which each query is moved to another place; the results are moved back.
        heads: key heads of a product.

    Returns:
        float32 [_HEADS, _MANY, KEYS + D], whatever the arguments, if bits do not depend on places and neighbours.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((_MANY, dim), (3 * KEYS, dim), (_MANY, KEYS), (3 * KEYS, dim))
    q, keys, weights, values = (torch.rand(_HEADS, *shape, generator=generator) for shape in shapes)
    tile = slice(KEYS, 2 * KEYS)
    parts = [
        [
            torch.cat((batched_product(x, k[:, tile].transpose(1, 2)), batched_product(w, v[:, tile])), -1)
            for x, w in zip(*(torch.split(part.roll(shift, 1), size, 1) for part in (q_part, w_part)), strict=True)
        ]
        for q_part, w_part, k, v in zip(*(torch.split(x, heads) for x in (q, weights, keys, values)), strict=True)
    ]
    return torch.cat([torch.cat(blocks, 1) for blocks in parts]).roll(-shift, 1)
