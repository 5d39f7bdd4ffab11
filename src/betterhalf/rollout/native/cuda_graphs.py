"""Decode steps captured as CUDA graphs, one for each bucket of batch size and attended length.

A decode step of a small model is hundreds of short kernels; launching them one by one takes longer than running them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.slots import SlotTable

_SMALLEST_LENGTH = 256
_WARM_UP = 2
"""Runs before a capture, in which libraries allocate their workspaces."""


def batch_bucket(active: int, slots: int) -> int:
    """Slots that a captured step covers: a power of two up to 32, then a multiple of 32, never more than there are."""
    bucket = 1 << (active - 1).bit_length() if active <= 32 else -(-active // 32) * 32
    return min(bucket, slots)


def length_bucket(attended: int, max_length: int) -> int:
    """Cached positions that a captured step reads: a power of two times 256, never more than there are."""
    bucket = _SMALLEST_LENGTH
    while bucket < attended:
        bucket *= 2
    return min(bucket, max_length)


class DecodeGraphs:
    """Captures on first use and replays after. Valid while the table's, cache's and weights' tensors stay in place."""

    def __init__(self, decoder: Decoder, table: SlotTable) -> None:
        self._decoder = decoder
        self._table = table
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}
        """Graph, its result, and the rope tables it reads: the decoder may make longer ones meanwhile."""
        self._pool: Any = None

    def run(self, attended: int) -> Tensor:
        """One decode step of all active slots: hidden states [active, hidden], overwritten by the next call.

        Slots between `active` and the bucket run too: they write to the cache of their own free slot only.
        """
        table = self._table
        key = (batch_bucket(table.active, table.cache.slots), length_bucket(attended, table.cache.max_length))
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        graph, hidden, _ = self._graphs[key]
        graph.replay()
        return hidden[: table.active]

    def _capture(self, batch: int, attended: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        table, graph = self._table, torch.cuda.CUDAGraph()
        inputs = table.tokens[:batch], table.lengths[:batch]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._decoder.decode(*inputs, table.cache, attended)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._decoder.decode(*inputs, table.cache, attended)
        self._pool = self._pool or graph.pool()
        return graph, hidden, self._decoder.rope_tables
