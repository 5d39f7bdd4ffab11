"""The sequences in the slots, advanced together by one token at a time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from betterhalf.errors import EngineNumericsError
from betterhalf.rollout import sampler
from betterhalf.rollout.native.cuda_graphs import DecodeGraphs
from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.expert_log import ExpertLog
from betterhalf.rollout.native.pending_step import PendingStep, StepOutput
from betterhalf.rollout.native.queue import PromptQueue
from betterhalf.rollout.native.slots import ActiveSequence, Sampled, SlotTable
from betterhalf.rollout.native.support_log import SupportLog

_MAX_LOGITS = 2**26
"""FP32 logits held at once (256 MiB); more rows are computed in parts."""


def rows_at_once(vocabulary: int) -> int:
    """Return the number of rows whose logits may be held at once."""
    return max(1, _MAX_LOGITS // vocabulary)


class RunningBatch:
    """Batch of running sequences: a decoder over a slot table, sampled from one distribution."""

    def __init__(
        self,
        decoder: Decoder,
        table: SlotTable,
        graphs: DecodeGraphs | None,
        wanted: sampler.Distribution,
        experts: ExpertLog | None = None,
    ) -> None:
        self._decoder = decoder
        self._graphs = graphs
        self._wanted = wanted
        self._log = SupportLog(decoder.config.vocab_size)
        self._experts = experts
        self.table = table
        """State of the slots."""

    @property
    def lag(self) -> int:
        """Number of steps by which the host reads results late: 1 with CUDA graphs, so that it does not wait for each
        graph, else 0. Sequences that have ended are not advanced meanwhile."""
        return 0 if self._graphs is None else 1

    def admit(self, queue: PromptQueue) -> PendingStep:
        """Fill the free slots from the queue and sample the first token of each new sequence."""
        admitted, hidden = queue.take(self.table.free, self.table.cache, self.table.active)
        slots = self.table.admit(admitted)
        if self._wanted.reports_support:
            self._log.open(admitted)
        return PendingStep(self._draw(self.table, slots, hidden, self._wanted), admitted)

    def step(self) -> PendingStep:
        """Sample one token for every active sequence."""
        table = self.table
        if self._graphs is not None:
            output = self._graphs.run(self._decode, self._wanted)
        else:
            attended = min(table.longest + 1, table.cache.max_length)
            with nullcontext() if self._experts is None else self._experts.pass_of(table.sequences):
                output = self._decode(table, table.active, attended, self._wanted)
        table.advance()
        return PendingStep(output, list(table.sequences))

    def ended(self, pending: PendingStep) -> list[ActiveSequence]:
        """Wait for a step and return the sequences that ended with it.

        Raises:
            EngineNumericsError: logits or a logprob of a sequence are not finite.
        """
        ended, broken = pending.result(self._log)
        if broken:
            self._refuse(broken[0])
        return ended

    def retire(self, sequences: list[ActiveSequence]) -> Sampled:
        """Take sequences out of their slots."""
        sampled = self.table.retire(sequences)
        if self._experts is not None:
            sampled = replace(sampled, experts=self._experts.close(sampled.sequences))
        if not self._wanted.reports_support:
            return sampled
        return replace(sampled, supports=self._log.close(sampled.sequences))

    def _decode(self, table: SlotTable, count: int, attended: int, wanted: sampler.Distribution) -> StepOutput:
        """Sample one token for the first `count` slots, entirely on the device."""
        slots = slice(0, count)
        hidden = self._decoder.decode(table.tokens[slots], table.lengths[slots], table.cache, attended)
        table.appended(slots)
        return self._draw(table, slots, hidden, wanted)

    def _draw(self, table: SlotTable, slots: slice, hidden: Tensor, wanted: sampler.Distribution) -> StepOutput:
        """Draw a token for each of these slots, in parts when their logits would take much memory."""
        keys, positions = table.keys[slots], table.positions[slots]
        rows, outputs = rows_at_once(self._decoder.config.vocab_size), []
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            draw = sampler.draw_at(self._decoder.logits(hidden[part]), keys[part], positions[part], wanted)
            where = slice(slots.start + start, min(slots.start + start + rows, slots.stop))
            outputs.append(StepOutput(events=table.record(where, draw), support=draw.support))
        return StepOutput.joined(outputs)

    def _refuse(self, sequence: ActiveSequence) -> None:
        """Name the token whose logits are not finite."""
        (slot,) = [slot for slot, other in enumerate(self.table.sequences) if other is sequence]
        position = int(self.table.positions[slot]) - 1
        raise EngineNumericsError(
            f"{sequence.label}, sibling {sequence.sibling}: the logits of completion token {position} are not finite "
            f"in {self._decoder.rounding.format}: {self._decoder.weights.why_not_finite()}"
        )
