"""Continuous batching: assigns sequences to slots. Requests join and leave between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from betterhalf.errors import InputError
from betterhalf.rollout.native.pending_step import PendingStep
from betterhalf.rollout.native.queue import PromptQueue
from betterhalf.rollout.native.running_batch import RunningBatch
from betterhalf.rollout.native.slots import ActiveSequence, Sampled
from betterhalf.rollout.requests import check_request
from betterhalf.rollout.sampler import sequence_key
from betterhalf.types import GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Length limits of prompts and completions."""

    context: int
    """Positions the model can attend over."""
    vocabulary: int
    """Tokens the model knows."""
    max_tokens: int
    """Maximum number of tokens of a completion, where the context has room for them."""

    def tokens(self, request: GenerateRequest) -> int:
        """Return the maximum number of tokens of each completion of a request."""
        return request.limit(self.max_tokens, self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Room that a scheduler reserves in the cache."""

    sequences: int
    """Sequences that run at once, if the engine has that many slots."""
    length: int
    """Maximum number of tokens of a prompt and its completion together."""
    tokens: int
    """Maximum number of tokens of a completion."""

    @classmethod
    def of(cls, requests: Iterable[GenerateRequest], limits: Limits) -> Capacity:
        """Return what these requests need, all at once; at least one of them asks for a completion."""
        asked = [request for request in requests if request.group_size > 0]
        return cls(
            sequences=sum(request.group_size for request in asked),
            length=max(len(request.token_ids) + limits.tokens(request) for request in asked),
            tokens=max(limits.tokens(request) for request in asked),
        )


class Scheduler:
    """Step-by-step sampler of completions, for requests that may be added and cancelled between steps.

    Draws depend on the key of a request alone, so a request added late gets the tokens it would have got in the first
    batch, up to rounding that differs between batch shapes. One scheduler of an engine is used at a time, and its
    weights stay the same while the scheduler has unfinished sequences.
    """

    def __init__(self, batch: RunningBatch, queue: PromptQueue, limits: Limits, abandon: Callable[[], None]) -> None:
        """Create a scheduler without requests.

        Args:
            batch: an empty batch.
            queue: an empty queue.
            limits: limits that the model and the sampling settings set.
            abandon: called when a step fails: it drops the cache, because non-finite keys and values must not outlive
                the sequence that made them.
        """
        self._batch, self._queue, self._limits, self._abandon = batch, queue, limits, abandon
        self._pending: deque[PendingStep] = deque()
        self._finished: list[Sampled] = []
        self._count = 0

    @property
    def unfinished(self) -> bool:
        """True while `step` has something to do or to return."""
        return bool(self._queue or self._batch.table.active or self._finished)

    def add(self, request: GenerateRequest) -> int:
        """Queue the siblings of a request; they join the running batch as slots become free.

        Returns:
            The number of the request: `ActiveSequence.request` of its siblings, counted from 0.

        Raises:
            InputError: the prompt is empty, leaves no room in the model's context, holds a token outside the
                vocabulary, or needs more room than the scheduler has reserved.
        """
        number, limits = self._count, self._limits
        label, most = request.label(number), limits.tokens(request)
        check_request(request, label, limits.context, limits.vocabulary)
        if request.group_size > 0:
            self._require_room(label, len(request.token_ids), most)
        self._count += 1
        siblings = [
            ActiveSequence(
                request=number,
                label=label,
                sibling=sibling,
                prompt_length=len(request.token_ids),
                max_tokens=most,
                key=sequence_key(request.key, sibling, request.first_position),
            )
            for sibling in range(request.first_sibling, request.first_sibling + request.group_size)
        ]
        if siblings:
            self._queue.add(request.token_ids, siblings)
        return number

    def _require_room(self, label: str, prompt_length: int, max_tokens: int) -> None:
        table = self._batch.table
        if prompt_length + max_tokens > table.cache.max_length or max_tokens > table.max_tokens:
            raise InputError(
                f"{label} needs {prompt_length} tokens of cache and {max_tokens} for its completion, but the scheduler "
                f"has reserved {table.cache.max_length} in all and {table.max_tokens} for a completion; reserve more"
            )

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Drop a request: `step` returns nothing more of it, and its slots are free.

        Raises:
            EngineNumericsError: as in `step`, because the result of a step that was launched before may be read only
                now.
        """
        table = self._batch.table
        self._queue.drop(number)
        try:
            # Sequences may only leave the table once no launched step refers to them.
            while self._pending:
                ended = self._batch.ended(self._pending.popleft())
                self._retire([sequence for sequence in ended if sequence.request != number])
        except BaseException:
            self._abandon()
            raise
        cancelled = [sequence for sequence in table.sequences if sequence.request == number]
        if cancelled:
            self._batch.retire(cancelled)
        # The end of a sequence may have been seen while an earlier request was cancelled.
        others = [sampled.without(number) for sampled in self._finished]
        self._finished = [sampled for sampled in others if sampled.sequences]

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """Fill free slots, sample one token for every active sequence, and return the sequences that have ended.

        With CUDA graphs, a sequence that has ended is returned one step late.

        Raises:
            EngineNumericsError: logits or a logprob of a sequence are not finite; the scheduler cannot be used
                afterwards.
        """
        batch, table = self._batch, self._batch.table
        try:
            while self._queue and table.free:
                self._retire(batch.ended(batch.admit(self._queue)))
            if table.active:
                self._pending.append(batch.step())
            while len(self._pending) > (batch.lag if table.active else 0):
                self._retire(batch.ended(self._pending.popleft()))
        except BaseException:
            self._abandon()
            raise
        finished, self._finished = self._finished, []
        return finished

    def _retire(self, ended: list[ActiveSequence]) -> None:
        """Take sequences that have ended out of their slots."""
        if ended:
            self._finished.append(self._batch.retire(ended))
