"""Rows of a tensor over the ranks: axis 0 is cut as FSDP2 cuts it, into equal parts; the last ones may be shorter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from betterhalf.distributed.shard_range import ShardRange

# torch 2.13 renamed both, and warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rows_of(shape: tuple[int, ...], rank: int, world_size: int) -> ShardRange:
    """Return the rows of one rank; ranks beyond the last row have none."""
    part = _part(shape, world_size)
    first = min(rank * part, shape[0])
    return ShardRange(first=first, count=min(part, shape[0] - first), shape=shape)


def gather_rows(local: Tensor, rows: ShardRange, world_size: int, device: torch.device) -> Tensor:
    """Return the whole tensor on `device`, in the dtype of `local`; every rank makes the same call.

    Args:
        local: rows of this rank, on any device.
        rows: those of this rank.
        world_size: number of ranks.
        device: device of the process group.
    """
    part = _part(rows.shape, world_size)
    mine = torch.zeros(part, *rows.shape[1:], dtype=local.dtype, device=device)
    mine[: rows.count].copy_(local)
    whole = torch.empty(world_size * part, *rows.shape[1:], dtype=local.dtype, device=device)
    # As bytes: no backend has to know the format.
    _all_gather(whole.view(-1).view(torch.uint8), mine.view(-1).view(torch.uint8))
    return whole[: rows.shape[0]]


def scatter_rows(whole: Tensor | None, rows: ShardRange, world_size: int, device: torch.device) -> Tensor:
    """Return the rows of this rank of a tensor that rank 0 has, in FP32; every rank makes the same call.

    Args:
        whole: float32, on any device; None on every rank but 0.
        rows: those of this rank.
        world_size: number of ranks.
        device: device of the process group.
    """
    part = _part(rows.shape, world_size)
    mine = torch.empty(part, *rows.shape[1:], device=device)
    parts = None
    if whole is not None:
        parts = [torch.zeros_like(mine) for _ in range(world_size)]
        for filled, own in zip(parts, torch.split(whole, part), strict=False):
            filled[: own.shape[0]].copy_(own)
    dist.scatter(mine, parts, src=0)
    return mine[: rows.count]


def padded(rows: ShardRange, world_size: int, device: torch.device) -> Tensor:
    """Return FP32 zeros for `add_over_ranks`: the shape of the whole tensor, with rows that make all parts equal."""
    return torch.zeros(world_size * _part(rows.shape, world_size), *rows.shape[1:], device=device)


def add_over_ranks(total: Tensor, rows: ShardRange, world_size: int) -> Tensor:
    """Return the rows of this rank of the sum of every rank's `total`; every rank makes the same call.

    Args:
        total: float32, from `padded`.
        rows: those of this rank.
        world_size: number of ranks.
    """
    mine = torch.empty(total.shape[0] // world_size, *total.shape[1:], device=total.device)
    _reduce_scatter(mine, total)
    return mine[: rows.count]


def _part(shape: tuple[int, ...], world_size: int) -> int:
    """Return the number of rows of each rank but the last ones."""
    return -(-shape[0] // world_size)
