"""Whole decode steps, from the newest token to the next one, captured as CUDA graphs: one for each batch bucket.

A decode step of a small model consists of hundreds of short kernels; launching them one by one takes longer than
running them. One graph serves sequences of all lengths: the kernels read lengths from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.pending_step import StepOutput
from betterhalf.rollout.native.slots import SlotTable
from betterhalf.rollout.sampler import Distribution

_WARM_UP = 2
"""Warm-up runs before a capture, in which libraries allocate their workspaces."""

Step = Callable[[SlotTable, int, int, Distribution], StepOutput]
"""(table, slots, attended positions, distribution) -> output for the slots."""


def batch_bucket(active: int, slots: int) -> int:
    """Return the slots that a captured step covers: a power of two up to 32, then a multiple of 32, at most `slots`."""
    bucket = 1 << (active - 1).bit_length() if active <= 32 else -(-active // 32) * 32
    return min(bucket, slots)


class DecodeGraphs:
    """CUDA graphs of decode steps; each is captured on first use, then replayed.

    Valid while the tensors of the table, the cache and the weights stay in place.
    """

    def __init__(self, decoder: Decoder, table: SlotTable) -> None:
        self._decoder = decoder
        self._table = table
        self._graphs: dict[tuple[int, Distribution], tuple[torch.cuda.CUDAGraph, StepOutput, Any]] = {}
        """(slots, distribution) -> graph, its output, and the rope tables that it reads, kept alive here because the
        decoder may replace its own by longer ones."""
        self._pool: Any = None

    def run(self, step: Step, wanted: Distribution) -> StepOutput:
        """Sample one token for each active slot.

        Slots between `active` and the bucket run too: each writes only to the cache of its own free slot.

        Args:
            step: the same computation in every call; no reference is kept, because it would make a cycle.
            wanted: distribution to sample from.

        Returns:
            Output for the active slots; the next call overwrites it.
        """
        table = self._table
        key = (batch_bucket(table.active, table.cache.slots), wanted)
        if key not in self._graphs:
            self._graphs[key] = self._capture(step, *key)
        graph, output, _ = self._graphs[key]
        graph.replay()
        return output.first(table.active)

    def _capture(self, step: Step, batch: int, wanted: Distribution) -> tuple[torch.cuda.CUDAGraph, StepOutput, Any]:
        table, graph = self._table, torch.cuda.CUDAGraph()
        arguments = (table, batch, table.cache.max_length, wanted)
        kept = [x.clone() for x in table.state()]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step(*arguments)
                # The step itself overwrites the tokens that the warm-up sampled and cached.
                for x, before in zip(table.state(), kept, strict=True):
                    x.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self._pool):
            output = step(*arguments)
        self._pool = self._pool or graph.pool()
        return graph, output, self._decoder.rope_tables
