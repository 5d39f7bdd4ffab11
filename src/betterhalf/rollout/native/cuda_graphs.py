"""Whole decode steps captured as CUDA graphs, from the newest token to the next one, one for each bucket of batch size.

A decode step of a small model is hundreds of short kernels; launching them one by one takes longer than running them.
How long sequences are does not matter: the kernels read lengths from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.slots import SlotTable
from betterhalf.rollout.sampler import Distribution

_WARM_UP = 2
"""Runs before a capture, in which libraries allocate their workspaces."""

Step = Callable[[SlotTable, int, int, Distribution], Tensor]
"""(table, slots, attended positions, distribution) -> what the step says of each slot, int8 [slots]."""


def batch_bucket(active: int, slots: int) -> int:
    """Slots that a captured step covers: a power of two up to 32, then a multiple of 32, never more than there are."""
    bucket = 1 << (active - 1).bit_length() if active <= 32 else -(-active // 32) * 32
    return min(bucket, slots)


class DecodeGraphs:
    """Captures on first use and replays after. Valid while the table's, cache's and weights' tensors stay in place."""

    def __init__(self, decoder: Decoder, table: SlotTable) -> None:
        self._decoder = decoder
        self._table = table
        self._graphs: dict[tuple[int, Distribution], tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}
        """By slots and distribution: graph, its result, and the rope tables it reads: the decoder may make longer ones
        meanwhile."""
        self._pool: Any = None

    def run(self, step: Step, wanted: Distribution) -> Tensor:
        """One token for each active slot; what `SlotTable.record` says of them, overwritten by the next call.

        `step` is always the same; it is not kept, because it would lead back to who keeps the graphs.
        Slots between `active` and the bucket run too: they write to the cache of their own free slot only.
        """
        table = self._table
        key = (batch_bucket(table.active, table.cache.slots), wanted)
        if key not in self._graphs:
            self._graphs[key] = self._capture(step, *key)
        graph, events, _ = self._graphs[key]
        graph.replay()
        return events[: table.active]

    def _capture(self, step: Step, batch: int, wanted: Distribution) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        table, graph = self._table, torch.cuda.CUDAGraph()
        arguments = (table, batch, table.cache.max_length, wanted)
        kept = [x.clone() for x in table.state()]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step(*arguments)
                # What a warm-up sampled and cached is overwritten by the step itself.
                for x, before in zip(table.state(), kept, strict=True):
                    x.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self._pool):
            events = step(*arguments)
        self._pool = self._pool or graph.pool()
        return graph, events, self._decoder.rope_tables
