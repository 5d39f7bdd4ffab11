"""Experts that the engine chose for the tokens of the running sequences, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from betterhalf.precision.routing import RoutingTape, compact
from betterhalf.rollout.native.mixture import Mixture
from betterhalf.rollout.native.slots import ActiveSequence
from betterhalf.types import TokenExperts


class ExpertLog:
    """Record of the running sequences' experts, from the first token of their prompts on."""

    def __init__(self, mixture: Mixture, tape: RoutingTape) -> None:
        """Create an empty record.

        Args:
            mixture: sizes of the mixture of experts.
            tape: the decoder's record of chosen experts.
        """
        self._mixture, self._tape = mixture, tape
        self._running: dict[ActiveSequence, list[Tensor]] = {}

    @contextmanager
    def pass_of(self, sequences: Sequence[ActiveSequence]) -> Iterator[None]:
        """Return a context for a decode step, which adds one token to the record of each of its sequences."""
        with self._tape.recording() as found:
            yield
        for sequence, row in zip(sequences, self.rows(found), strict=False):
            self._running[sequence].append(row[None])

    def rows(self, found: Mapping[int, Tensor]) -> Tensor:
        """Return the recorded choices of a pass of T tokens, uint8 or int16 [T, L, K]."""
        stacked = torch.stack([found[layer] for layer in range(self._mixture.num_layers)], 1)
        return compact(stacked, self._mixture.num_experts)

    @contextmanager
    def prompts(self) -> Iterator[dict[int, Tensor]]:
        """Return a context for a prefill; pass what it yields to `rows` after its end."""
        with self._tape.recording() as found:
            yield found

    def open(self, sequences: Sequence[ActiveSequence], prompt: Tensor) -> None:
        """Begin the record of siblings with the choices for their prompt, [P, L, K]."""
        self._running.update((sequence, [prompt]) for sequence in sequences)

    def close(self, sequences: Sequence[ActiveSequence]) -> list[TokenExperts]:
        """Return the record of sequences that leave the batch, and forget it."""
        return [TokenExperts(experts_NLK=torch.cat(self._running.pop(sequence))) for sequence in sequences]
