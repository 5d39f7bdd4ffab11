"""A decode step that may still be running on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.rollout.native.slots import BROKEN, ActiveSequence
from betterhalf.rollout.native.support_log import SupportLog
from betterhalf.rollout.support import RowSupport


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Output of a step for N slots, on the device, until the host reads it."""

    events: Tensor
    """int8 [N], from `SlotTable.record`."""
    support: RowSupport | None
    """Tokens that could be drawn in each slot; None if the distribution does not report them."""

    def first(self, slots: int) -> StepOutput:
        """Return the output for the first slots."""
        support = self.support and self.support.mapped(lambda rows: rows[:slots])
        return StepOutput(events=self.events[:slots], support=support)

    @classmethod
    def joined(cls, parts: Sequence[StepOutput]) -> StepOutput:
        """Concatenate the outputs for parts of the slots, at least one."""
        if len(parts) == 1:
            return parts[0]
        supports = [part.support for part in parts if part.support is not None]
        return cls(
            events=torch.cat([part.events for part in parts]),
            support=RowSupport.joined(supports) if supports else None,
        )


class PendingStep:
    """Output of a step on its way to the host."""

    def __init__(self, output: StepOutput, sequences: list[ActiveSequence]) -> None:
        """Start a non-blocking copy of the step's output to the host.

        Args:
            output: output for N slots.
            sequences: the N sequences that held these slots, in order.
        """
        self._sequences = sequences
        self._ready: torch.cuda.Event | None = None
        self._events = _to_host(output.events)
        self._support = output.support and output.support.mapped(_to_host)
        if output.events.is_cuda:
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def result(self, log: SupportLog) -> tuple[list[ActiveSequence], list[ActiveSequence]]:
        """Wait for the step, and log the tokens that could be drawn in it.

        Returns:
            The sequences that ended with it, and those among them whose logits or logprob were not finite.
        """
        if self._ready is not None:
            self._ready.synchronize()
        if self._support is not None:
            log.append(self._sequences, self._support)
        ended, broken = [], []
        for sequence, event in zip(self._sequences, self._events.tolist(), strict=True):
            if event:
                ended.append(sequence)
            if event == BROKEN:
                broken.append(sequence)
        return ended, broken


def _to_host(values: Tensor) -> Tensor:
    """Start a non-blocking copy from a GPU; a copy, because the next replay of the graph overwrites its result."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
