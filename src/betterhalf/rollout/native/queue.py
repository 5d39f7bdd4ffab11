"""Queue of sequences that wait for a slot, and prefill of their prompts: each prompt runs once for all its siblings."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.expert_log import ExpertLog
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.slots import ActiveSequence

_PREFILL_TOKENS = 4096
"""Maximum number of prompt tokens run in one pass; prompts are run ahead of need up to this number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Results of the prefill of one prompt."""

    saved: Tensor
    """Its keys and values [layers, 2, length, kv_heads, D]."""
    hidden: Tensor
    """Final hidden state of its last token [hidden]."""
    experts: Tensor | None
    """Experts of its tokens [length, L, K], as in `TokenExperts`; None if they are not recorded."""


class PromptQueue:
    """Queue of sequences, first in, first out; siblings in order."""

    def __init__(self, decoder: Decoder, device: torch.device, experts: ExpertLog | None = None) -> None:
        """Create an empty queue.

        Args:
            decoder: runs the prompts.
            device: device of the decoder.
            experts: records the experts that are chosen for the prompts; None for no record.
        """
        self._decoder = decoder
        self._experts = experts
        self._device = device
        self._waiting: deque[ActiveSequence] = deque()
        self._unrun: dict[int, tuple[int, ...]] = {}
        """Request -> token ids of its prompt, which has not run; in the order of arrival."""
        self._prefixes: dict[int, Prefix] = {}
        """Request -> its prompt, which has run; kept while siblings of it wait."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, token_ids: tuple[int, ...], siblings: list[ActiveSequence]) -> None:
        """Append the siblings of one request, at least one, and their prompt."""
        self._waiting += siblings
        self._unrun[siblings[0].request] = token_ids

    def drop(self, request: int) -> None:
        """Remove the siblings of a request that still wait, and its prompt."""
        self._waiting = deque(s for s in self._waiting if s.request != request)
        self._unrun.pop(request, None)
        self._prefixes.pop(request, None)

    def take(self, count: int, cache: KVCache, first_slot: int) -> tuple[list[ActiveSequence], Tensor]:
        """Move up to `count` sequences, at least one, into the cache's slots from `first_slot` on.

        Returns:
            The sequences, and the final hidden state of each one's prompt [N, hidden].
        """
        taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        hidden, slot = [], first_slot
        for request, siblings in groupby(taken, key=lambda s: s.request):
            joining, prefix = list(siblings), self._prefix(request)
            number = len(joining)
            cache.fill(slot, slot + number, prefix.saved)
            if self._experts is not None and prefix.experts is not None:
                self._experts.open(joining, prefix.experts)
            hidden.append(prefix.hidden.expand(number, -1))
            slot += number
        self._release({s.request for s in taken})
        return taken, torch.cat(hidden)

    def _prefix(self, request: int) -> Prefix:
        if request not in self._prefixes:
            self._run_ahead()
        return self._prefixes[request]

    def _release(self, requests: set[int]) -> None:
        """Free the prompts of which no sibling waits any more; only the first one in the queue can have one left."""
        waiting = self._waiting[0].request if self._waiting else None
        for request in requests - {waiting}:
            del self._prefixes[request]

    def _run_ahead(self) -> None:
        """Run the next prompts, at least one, in one packed pass, sorted so that equal lengths are neighbours."""
        prompts = sorted(self._next_prompts(), key=lambda prompt: len(prompt[1]))
        lengths = tuple(len(token_ids) for _, token_ids in prompts)
        tokens = torch.tensor([token for _, token_ids in prompts for token in token_ids], device=self._device)
        hidden, saved, experts = self._prefill(tokens, lengths)
        parts = torch.split(saved, list(lengths), dim=2)
        for row, ((request, _), part, chosen) in enumerate(zip(prompts, parts, experts, strict=True)):
            self._prefixes[request] = Prefix(saved=part, hidden=hidden[row], experts=chosen)

    def _prefill(
        self, tokens: Tensor, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor] | Sequence[None]]:
        """Return the results of `Decoder.prefill`, and the experts of each prompt."""
        if self._experts is None:
            return *self._decoder.prefill(tokens, lengths), [None] * len(lengths)
        with self._experts.prompts() as found:
            hidden, saved = self._decoder.prefill(tokens, lengths)
        return hidden, saved, torch.split(self._experts.rows(found), list(lengths))

    def _next_prompts(self) -> list[tuple[int, tuple[int, ...]]]:
        """Remove and return (request, prompt) of the next prompts that fit in one pass, at least one."""
        batch: list[int] = []
        total = 0
        for request, token_ids in self._unrun.items():
            total += len(token_ids)
            if batch and total > _PREFILL_TOKENS:
                break
            batch.append(request)
        return [(request, self._unrun.pop(request)) for request in batch]
