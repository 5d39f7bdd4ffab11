"""State of the running sequences as tensors over slots, active slots first, and the tokens they have sampled."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.sampler import Draw
from betterhalf.token_support import TokenSupport, TopTokens
from betterhalf.types import Completion, TokenExperts

ENDED, BROKEN = 1, 2
"""Events of a step for a sequence: it has ended, or its logits are not finite; 0 if it continues."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveSequence:
    """One sibling of one prompt."""

    request: int
    """Number of its request; see `Scheduler.add`."""
    sibling: int
    """Index among the siblings of the prompt."""
    prompt_length: int
    """Tokens of the prompt."""
    max_tokens: int
    """Maximum number of tokens it may sample, within the model's context."""
    key: int
    """Start of its stream of random numbers; see `sampler.sequence_key`."""
    label: str = ""
    """Name of its prompt in messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """N sequences that have ended, and copies of what their slots held, still on the device."""

    sequences: list[ActiveSequence]
    """The N sequences."""
    counts: Tensor
    """int64 [N]: tokens sampled."""
    token_ids: Tensor
    """int64 [N, max_tokens + 1]; entries beyond a count belong to another sequence."""
    logprobs: Tensor
    """float32 [N, max_tokens + 1]; entries beyond a count belong to another sequence."""
    top: tuple[Tensor, Tensor] | None = None
    """int64 and float32 [N, max_tokens + 1, K]: the most likely tokens and their logprobs; None if not recorded."""
    supports: list[TokenSupport] | None = None
    """Tokens that each sequence could have drawn, on the host; None if the distribution does not report them."""

    experts: list[TokenExperts] | None = None
    """Experts of the tokens of each sequence, on the host; None if they were not recorded."""

    def completions(self, stops: Container[int], policy_version: int) -> list[Completion]:
        """Return the completion of each sequence; waits for the device.

        Args:
            stops: tokens that end a completion.
            policy_version: version of the weights that sampled.
        """
        supports: Sequence[TokenSupport | None] = self.supports or [None] * len(self.sequences)
        experts: Sequence[TokenExperts | None] = self.experts or [None] * len(self.sequences)
        rows = zip(self.counts.tolist(), self.token_ids.tolist(), self.logprobs.tolist(), strict=True)
        return [
            Completion(
                token_ids=tuple(token_ids[:count]),
                behavior_logprobs=tuple(logprobs[:count]),
                finish_reason="stop" if token_ids[count - 1] in stops else "length",
                policy_version=policy_version,
                top=top,
                support=support,
                experts=chosen,
            )
            for (count, token_ids, logprobs), top, support, chosen in zip(
                rows, self._tops(), supports, experts, strict=True
            )
        ]

    def _tops(self) -> list[TopTokens | None]:
        if self.top is None:
            return [None] * len(self.sequences)
        (ids, logprobs), counts = (part.cpu() for part in self.top), self.counts.tolist()
        return [
            TopTokens(token_ids_CK=ids[row, :count].clone(), logprobs_CK=logprobs[row, :count].clone())
            for row, count in enumerate(counts)
        ]

    def without(self, request: int) -> Sampled:
        """Return the sequences of all other requests."""
        kept = [row for row, sequence in enumerate(self.sequences) if sequence.request != request]
        return Sampled(
            sequences=[self.sequences[row] for row in kept],
            counts=self.counts[kept],
            token_ids=self.token_ids[kept],
            logprobs=self.logprobs[kept],
            top=None if self.top is None else (self.top[0][kept], self.top[1][kept]),
            supports=self.supports and [self.supports[row] for row in kept],
            experts=self.experts and [self.experts[row] for row in kept],
        )


class SlotTable:
    """State of up to `cache.slots` sequences. Tensors never move, so that CUDA graphs can read them."""

    def __init__(self, cache: KVCache, max_tokens: int, stop_lookup: Tensor, top_tokens: int = 0) -> None:
        slots, device = cache.slots, cache.values.device
        self.cache = cache
        self.active = 0
        """Number of slots in use, the first ones."""
        self.sequences: list[ActiveSequence] = []
        """Owner of each active slot."""
        self.tokens, self.lengths, self.positions, self.limits, self.keys, self.running = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(6)
        )
        # Newest token; tokens cached; tokens sampled; most tokens to sample; random stream; 1 while it runs, else 0.
        # One extra column, which is never read: a step may write to it for a sequence that has ended.
        self._sampled = torch.zeros(slots, max_tokens + 1, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(slots, max_tokens + 1, dtype=torch.float32, device=device)
        # Most likely tokens of each draw, if it reports them.
        self._top_ids = torch.zeros(slots, max_tokens + 1, top_tokens, dtype=torch.int64, device=device)
        self._top_logprobs = torch.zeros_like(self._top_ids, dtype=torch.float32)
        self._stop_lookup = stop_lookup
        self._steps = 0
        self._offsets: list[int] = []
        self._lead = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest completion it can hold."""
        return int(self._sampled.shape[1]) - 1

    @property
    def free(self) -> int:
        """Number of slots not in use."""
        return self.cache.slots - self.active

    @property
    def longest(self) -> int:
        """Cached tokens of the longest active sequence, counted on the host: reading the device would wait for it."""
        return self._lead + self._steps

    def clear(self) -> None:
        """Remove all sequences."""
        self.active, self.sequences, self._offsets, self._lead, self._steps = 0, [], [], 0, 0
        self.lengths.zero_()
        self.positions.zero_()
        self.running.zero_()

    def admit(self, sequences: list[ActiveSequence]) -> slice:
        """Put sequences, whose prompts are already in the cache, into the next free slots, and return those slots."""
        added = slice(self.active, self.active + len(sequences))
        for target, values in (
            (self.lengths, [s.prompt_length for s in sequences]),
            (self.limits, [s.max_tokens for s in sequences]),
            (self.keys, [s.key for s in sequences]),
        ):
            target[added] = self._on_device(values)
        self.positions[added] = 0
        self.running[added] = 1
        self.active = added.stop
        self.sequences += sequences
        self._offsets += [s.prompt_length - self._steps for s in sequences]
        self._lead = max(self._offsets)
        return added

    def appended(self, slots: slice) -> None:
        """Count, on the device, the token just appended to the cache in those of `slots` that still run."""
        self.lengths[slots] += self.running[slots]

    def advance(self) -> None:
        """Count, on the host, the token just appended to the cache of every active slot."""
        self._steps += 1

    def record(self, slots: slice, draw: Draw) -> Tensor:
        """Store one sampled token for each of `slots` that still runs.

        A sequence that has ended or is broken is not advanced any more, even before the host knows.

        Returns:
            Event of each slot, int8: `BROKEN` where a logit or the logprob is not finite, else `ENDED` where the
            sequence has ended, else 0.
        """
        running = self.running[slots]
        index = self.positions[slots].unsqueeze(1)
        self._sampled[slots].scatter_(1, index, draw.token_ids.unsqueeze(1))
        self._logprobs[slots].scatter_(1, index, draw.logprobs.unsqueeze(1))
        if draw.top is not None:
            places = index.unsqueeze(2).expand(-1, -1, self._top_ids.shape[2])
            for state, values in zip((self._top_ids, self._top_logprobs), draw.top, strict=True):
                state[slots].scatter_(1, places, values.unsqueeze(1))
        self.tokens[slots] = draw.token_ids
        self.positions[slots] += running
        ended = self._stop_lookup[draw.token_ids] | (self.positions[slots] >= self.limits[slots])
        events = torch.where(draw.finite, ended * ENDED, BROKEN) * running
        running.masked_fill_(events > 0, 0)
        return events.to(torch.int8)

    def state(self) -> tuple[Tensor, ...]:
        """Return the tensors that a step changes, without cache and samples; a graph's warm-up restores them."""
        return self.tokens, self.lengths, self.positions, self.running

    def retire(self, sequences: list[ActiveSequence]) -> Sampled:
        """Remove sequences, and move the last active ones into their slots."""
        gone = {id(sequence) for sequence in sequences}
        ended = [slot for slot, sequence in enumerate(self.sequences) if id(sequence) in gone]
        index = self._on_device(ended)
        sampled = Sampled(
            sequences=[self.sequences[slot] for slot in ended],
            counts=self.positions[index],
            token_ids=self._sampled[index],
            logprobs=self._logprobs[index],
            top=(self._top_ids[index], self._top_logprobs[index]) if self._top_ids.shape[2] else None,
        )
        self._close_gaps(ended)
        return sampled

    def _on_device(self, numbers: list[int]) -> Tensor:
        """Return an int64 tensor; on a GPU it is copied from pinned memory without blocking."""
        tensor, device = torch.tensor(numbers, dtype=torch.int64), self.tokens.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def _close_gaps(self, ended: list[int]) -> None:
        remaining, gone = self.active - len(ended), set(ended)
        targets = [slot for slot in ended if slot < remaining]
        sources = [slot for slot in range(remaining, self.active) if slot not in gone]
        if targets:
            self._move(sources, targets)
        for state in (self.lengths, self.positions, self.running):
            state[remaining : self.active] = 0
        del self.sequences[remaining:], self._offsets[remaining:]
        self.active = remaining
        self._lead = max(self._offsets, default=0)

    def _move(self, sources: list[int], targets: list[int]) -> None:
        source, target = self._on_device(sources), self._on_device(targets)
        numbers = self.tokens, self.lengths, self.positions, self.limits, self.keys, self.running
        for state in (*numbers, self._sampled, self._logprobs, self._top_ids, self._top_logprobs):
            state[target] = state[source]
        self.cache.move(source, target, self.longest)
        for a, b in zip(sources, targets, strict=True):
            self.sequences[b], self._offsets[b] = self.sequences[a], self._offsets[a]
