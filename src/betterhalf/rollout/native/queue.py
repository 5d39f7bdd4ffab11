"""Sequences waiting for a slot, and the prompts already run for them: each prompt runs once for all its siblings."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.slots import ActiveSequence
from betterhalf.types import GenerateRequest

_PREFILL_TOKENS = 4096
"""Prompt tokens run in one pass; prompts are run ahead of need up to this many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """A prompt that has run."""

    saved: Tensor
    """Its keys and values [layers, 2, length, kv_heads, D]."""
    hidden: Tensor
    """Final hidden state of its last token [hidden]."""


class PromptQueue:
    """First in, first out, in request and sibling order."""

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[GenerateRequest],
        sequences: list[ActiveSequence],
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._requests = requests
        self._device = device
        self._waiting = deque(sequences)
        self._prompts = deque(dict.fromkeys(s.request for s in sequences))
        self._siblings = Counter(s.request for s in sequences)
        self._prefixes: dict[int, Prefix] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self, count: int, cache: KVCache, first_slot: int) -> tuple[list[ActiveSequence], Tensor]:
        """Move up to `count` sequences, at least one, into the cache's slots from `first_slot` on.

        Returns:
            The sequences, and the final hidden state of each one's prompt [N, hidden].
        """
        taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        hidden, slot = [], first_slot
        for request, siblings in groupby(taken, key=lambda s: s.request):
            number = sum(1 for _ in siblings)
            prefix = self._prefix(request)
            cache.fill(slot, slot + number, prefix.saved)
            hidden.append(prefix.hidden.expand(number, -1))
            slot += number
            self._release(request, number)
        return taken, torch.cat(hidden)

    def _prefix(self, request: int) -> Prefix:
        if request not in self._prefixes:
            self._run_ahead()
        return self._prefixes[request]

    def _release(self, request: int, number: int) -> None:
        """Drop a prompt when its last sibling has been served."""
        self._siblings[request] -= number
        if self._siblings[request] == 0:
            del self._prefixes[request]

    def _run_ahead(self) -> None:
        """Run the next prompts, at least one, in one packed pass; sorted, so that equal lengths lie side by side."""
        batch = [self._prompts.popleft()]
        total = self._length(batch[0])
        while self._prompts and total + self._length(self._prompts[0]) <= _PREFILL_TOKENS:
            batch.append(self._prompts.popleft())
            total += self._length(batch[-1])
        batch.sort(key=self._length)
        token_ids = [token for request in batch for token in self._requests[request].token_ids]
        lengths = tuple(self._length(request) for request in batch)
        hidden, saved = self._decoder.prefill(torch.tensor(token_ids, device=self._device), lengths)
        for row, (request, part) in enumerate(zip(batch, torch.split(saved, list(lengths), dim=2), strict=True)):
            self._prefixes[request] = Prefix(saved=part, hidden=hidden[row])

    def _length(self, request: int) -> int:
        return len(self._requests[request].token_ids)
