"""FP32 products on a CPU in which a row's bits depend on that row alone, for `engine.rounding = "exact"`.

A GEMM library chooses its kernel, and with it the order of sums, by the shape of the whole product: a row of a prompt
and the same row in a decode step may differ in the last bit. Here rows are computed in tiles of one fixed shape, the
last one padded with zeros. Larger blocks are used where a test product shows that they give the same bits.
"""

from __future__ import annotations

from functools import cache
from itertools import chain, repeat

import torch
from torch import Tensor

from betterhalf.errors import InputError
from betterhalf.precision.products import packed, product

_TILE = 32
"""Rows of a tile. A smaller tile is slower in training, a larger one for few sequences (`benchmarks/exact.py`)."""
_BLOCKS = (2048, 512, 128)
"""Rows of the larger blocks, tried in this order."""
_MAX_RESULTS = 2**21
"""Maximum number of results of a block, except of the smallest size: beyond it, a tile is as fast."""


def tiled_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right^T`, each row of which depends only on that row of `left`; not differentiable.

    Args:
        left: float32 [M, K].
        right: float32 [N, K], a result of `packed`.

    Returns:
        float32 [M, N], contiguous.

    Raises:
        InputError: this processor's products do depend on other rows.
    """
    sizes = block_sizes(*right.shape, torch.get_num_threads())
    rows = left.contiguous()
    count, start = rows.shape[0], 0
    parts = []
    for size in chain.from_iterable(repeat(size, 1 + count // size) for size in sizes):
        if start + size <= count:
            parts.append(product(rows[start : start + size], right))
            start += size
    if start < count:
        padded = rows.new_zeros(_TILE, rows.shape[1])
        padded[: count - start] = rows[start:]
        parts.append(product(padded, right)[: count - start])
    return _joined(parts, count, right)


def _joined(parts: list[Tensor], count: int, right: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty(count, right.shape[0])


@cache
def block_sizes(columns: int, width: int, threads: int) -> tuple[int, ...]:
    """Return the block sizes that give the same bits as tiles for a weight of this shape, the tile itself last.

    Args:
        columns: rows of the weight, N.
        width: columns of the weight, K.
        threads: number of threads that compute; it may change the order of sums.

    Raises:
        InputError: a row of a tile depends on its place or on its neighbours.
    """
    generator = torch.Generator().manual_seed(0)
    largest = next((size for size in _BLOCKS if size * columns <= _MAX_RESULTS), 4 * _TILE)
    weight = packed(torch.randn(columns, width, generator=generator))
    rows = torch.randn(largest, width, generator=generator)
    wanted = _in_blocks(rows, weight, _TILE)
    if not _independent_of_place(rows, weight, wanted):
        raise InputError(
            f"engine.rounding=exact needs matrix products whose rows do not depend on each other, and this "
            f"processor's do for a weight of shape {columns} x {width}; set engine.rounding=aligned"
        )
    return (*(size for size in _BLOCKS if size <= largest and _equal(rows, weight, size, wanted)), _TILE)


def _in_blocks(rows: Tensor, weight: Tensor, size: int) -> Tensor:
    return torch.cat([product(part, weight) for part in torch.split(rows, size)])


def _equal(rows: Tensor, weight: Tensor, size: int, wanted: Tensor) -> bool:
    return torch.equal(_in_blocks(rows[: rows.shape[0] // size * size], weight, size), wanted)


def _independent_of_place(rows: Tensor, weight: Tensor, wanted: Tensor) -> bool:
    """Return whether rows keep their bits at another place, between other neighbours, and beside rows of zeros."""
    turned = all(
        torch.equal(_in_blocks(rows.roll(shift, 0), weight, _TILE), wanted.roll(shift, 0)) for shift in (1, 19)
    )
    alone = torch.zeros(_TILE, rows.shape[1])
    alone[0] = rows[0]
    return turned and torch.equal(product(alone, weight)[0], wanted[0])
