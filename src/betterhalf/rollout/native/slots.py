"""The sequences in flight: their state as tensors over slots, active slots at the front, and what they have sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.sampler import Draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One sibling of one prompt."""

    request: int
    """Index of its request."""
    sibling: int
    prompt_length: int
    max_tokens: int
    """Most tokens it may sample, the model's context respected."""
    key: int
    """Start of its stream of random numbers; see `sampler.sequence_key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A sequence that has ended."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class SlotTable:
    """State of up to `cache.slots` sequences. Tensors never move, so that CUDA graphs can read them."""

    def __init__(self, cache: KVCache, max_tokens: int, stop_lookup: Tensor) -> None:
        slots, device = cache.slots, cache.values.device
        self.cache = cache
        self.active = 0
        """Slots in use: 0 to `active`."""
        self.sequences: list[Sequence] = []
        """Owner of each active slot."""
        self.tokens, self.lengths, self.positions, self.limits, self.keys = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(5)
        )
        # Newest token; tokens cached; tokens sampled; most tokens to sample; random stream.
        self._sampled = torch.zeros(slots, max_tokens, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(slots, max_tokens, dtype=torch.float32, device=device)
        self._stop_lookup = stop_lookup
        self._steps = 0
        self._offsets: list[int] = []
        self._lead = 0

    @property
    def max_tokens(self) -> int:
        """Longest completion it can hold."""
        return int(self._sampled.shape[1])

    @property
    def free(self) -> int:
        """Slots not in use."""
        return self.cache.slots - self.active

    @property
    def longest(self) -> int:
        """Tokens cached of the longest active sequence: counted here, because asking the device would wait for it."""
        return self._lead + self._steps

    def clear(self) -> None:
        """Forget all sequences."""
        self.active, self.sequences, self._offsets, self._lead, self._steps = 0, [], [], 0, 0
        self.lengths.zero_()

    def admit(self, sequences: list[Sequence]) -> slice:
        """Put sequences into the next free slots; their prompts must be in the cache already. Returns those slots."""
        added = slice(self.active, self.active + len(sequences))
        for target, values in (
            (self.lengths, [s.prompt_length for s in sequences]),
            (self.limits, [s.max_tokens for s in sequences]),
            (self.keys, [s.key for s in sequences]),
        ):
            target[added] = torch.tensor(values, dtype=torch.int64, device=target.device)
        self.positions[added] = 0
        self.active = added.stop
        self.sequences += sequences
        self._offsets += [s.prompt_length - self._steps for s in sequences]
        self._lead = max(self._offsets)
        return added

    def advance(self) -> None:
        """Count the token just appended to every active slot's cache."""
        self.lengths[: self.active] += 1
        self._steps += 1

    def record(self, slots: slice, draw: Draw) -> Tensor:
        """Store one sampled token for each of these slots; bool: which sequences have now ended."""
        index = self.positions[slots].unsqueeze(1)
        self._sampled[slots].scatter_(1, index, draw.token_ids.unsqueeze(1))
        self._logprobs[slots].scatter_(1, index, draw.logprobs.unsqueeze(1))
        self.tokens[slots] = draw.token_ids
        self.positions[slots] += 1
        return self._stop_lookup[draw.token_ids] | (self.positions[slots] >= self.limits[slots])

    def retire(self, ended: list[int]) -> list[Sampled]:
        """Take out the sequences in these slots (ascending), and close the gaps with the last active ones."""
        index = torch.tensor(ended, device=self.tokens.device)
        rows = zip(
            ended,
            self.positions[index].tolist(),
            self._sampled[index].tolist(),
            self._logprobs[index].tolist(),
            strict=True,
        )
        sampled = [
            Sampled(sequence=self.sequences[slot], token_ids=tuple(ids[:count]), logprobs=tuple(logprobs[:count]))
            for slot, count, ids, logprobs in rows
        ]
        self._close_gaps(ended)
        return sampled

    def _close_gaps(self, ended: list[int]) -> None:
        remaining, gone = self.active - len(ended), set(ended)
        targets = [slot for slot in ended if slot < remaining]
        sources = [slot for slot in range(remaining, self.active) if slot not in gone]
        if targets:
            self._move(sources, targets)
        self.lengths[remaining : self.active] = 0
        del self.sequences[remaining:], self._offsets[remaining:]
        self.active = remaining
        self._lead = max(self._offsets, default=0)

    def _move(self, sources: list[int], targets: list[int]) -> None:
        device = self.tokens.device
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for state in (self.tokens, self.lengths, self.positions, self.limits, self.keys, self._sampled, self._logprobs):
            state[target] = state[source]
        self.cache.move(source, target, self.longest)
        for a, b in zip(sources, targets, strict=True):
            self.sequences[b], self._offsets[b] = self.sequences[a], self._offsets[a]
