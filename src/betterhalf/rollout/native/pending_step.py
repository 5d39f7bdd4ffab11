"""A decode step that may still be running on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf.rollout.native.slots import BROKEN, ActiveSequence


class PendingStep:
    """Events of a step on their way to the host."""

    def __init__(self, events: Tensor, sequences: list[ActiveSequence]) -> None:
        """Start a non-blocking copy of the step's events to the host.

        Args:
            events: int8 [N], from `SlotTable.record`.
            sequences: the N sequences that held the step's slots, in order.
        """
        self._sequences = sequences
        self._ready: torch.cuda.Event | None = None
        self._events = events
        if events.is_cuda:
            # Copied, because the next replay of the graph overwrites its result.
            self._events = torch.empty(events.shape, dtype=events.dtype, pin_memory=True)
            self._events.copy_(events, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def result(self) -> tuple[list[ActiveSequence], list[ActiveSequence]]:
        """Wait for the step.

        Returns:
            The sequences that ended with it, and those among them whose logits or logprob were not finite.
        """
        if self._ready is not None:
            self._ready.synchronize()
        ended, broken = [], []
        for sequence, event in zip(self._sequences, self._events.tolist(), strict=True):
            if event:
                ended.append(sequence)
            if event == BROKEN:
                broken.append(sequence)
        return ended, broken
