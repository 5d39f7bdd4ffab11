"""Routing of the trainer's passes: experts replayed from the engine, and the routers' own choices recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from betterhalf.batches import MicroBatch
from betterhalf.precision.routing import RoutingTape, compact


class Routing:
    """Choices of experts in the passes of one trainer; does nothing for a model without experts."""

    def __init__(self, tape: RoutingTape | None, num_experts: int, *, replays: bool) -> None:
        """Use the tape of the model's routers.

        Args:
            tape: shared by all routers; None for a model without any.
            num_experts: number of experts in a layer.
            replays: compute with the engine's choices (arXiv 2510.11370).
        """
        self._tape, self.num_experts, self._replays = tape, num_experts, replays

    def of(self, micro: MicroBatch) -> AbstractContextManager[None]:
        """Return a context for all passes over a pack, forward and backward: it computes with the pack's experts."""
        if self._tape is None or not self._replays:
            return nullcontext()
        return self._tape.replaying(micro.experts_TLK)

    @contextmanager
    def recording(self) -> Iterator[Mapping[int, Tensor]]:
        """Return a context of one forward pass, which yields what `chosen` reads once it has ended."""
        if self._tape is None:
            yield {}
            return
        with self._tape.recording() as found:
            yield found

    def chosen(self, found: Mapping[int, Tensor]) -> Tensor | None:
        """Return the routers' own choices in a recorded pass, uint8 or int16 [T, L, K], in host memory."""
        if not found:
            return None
        return compact(torch.stack([found[layer] for layer in sorted(found)], 1), self.num_experts).cpu()
