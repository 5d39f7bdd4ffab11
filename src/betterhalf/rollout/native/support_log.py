"""The tokens that could be drawn at each position of the running sequences, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from betterhalf.rollout.native.slots import ActiveSequence
from betterhalf.rollout.support import RowSupport
from betterhalf.token_support import TokenSupport, num_words


@dataclass(slots=True)
class _Positions:
    """Record of one sequence, which grows by one position in each step."""

    counts: list[int] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)
    words: list[bytes] = field(default_factory=list)


class SupportLog:
    """Record of the running sequences' supports, from the first token on."""

    def __init__(self, vocabulary: int) -> None:
        """Create an empty record.

        Args:
            vocabulary: number of token ids.
        """
        self._vocabulary = vocabulary
        self._running: dict[ActiveSequence, _Positions] = {}

    def open(self, sequences: Sequence[ActiveSequence]) -> None:
        """Begin the record of sequences that join the batch."""
        self._running.update((sequence, _Positions()) for sequence in sequences)

    def append(self, sequences: Sequence[ActiveSequence], support: RowSupport) -> None:
        """Add one position to each of the sequences, unless it has left the batch.

        Args:
            sequences: the B sequences that held the step's slots, in order.
            support: tokens that could be drawn in these slots, on the host.
        """
        rows, vocabulary = support.words_BW.numpy(), self._vocabulary
        columns = zip(sequences, support.counts_B.tolist(), support.masses_B.tolist(), rows, strict=True)
        for sequence, count, mass, words in columns:
            # With CUDA graphs, a sequence keeps its slot for one step after its end; by now it has left the batch.
            if (positions := self._running.get(sequence)) is not None:
                positions.counts.append(count)
                positions.masses.append(mass)
                positions.words.append(words[: num_words(count, vocabulary)].tobytes())

    def close(self, sequences: Sequence[ActiveSequence]) -> list[TokenSupport]:
        """Return the record of sequences that leave the batch, and forget it."""
        return [self._support(self._running.pop(sequence)) for sequence in sequences]

    def _support(self, positions: _Positions) -> TokenSupport:
        return TokenSupport(
            vocabulary=self._vocabulary,
            counts=tuple(positions.counts),
            masses=tuple(positions.masses),
            words=b"".join(positions.words),
        )
