"""Traces of the native engine's decoder: the result of every operation, on each path of a sequence through it.

Whole: all tokens in one packed pass. Decoded: the prompt in one pass, then token by token through the KV cache, alone
or in a batch with other sequences. A trace can be forced: then every operation reads the results of another trace
instead of those of its predecessors, so that a difference belongs to that operation alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from betterhalf.diagnostics.divergence import Place, Trace
from betterhalf.rollout.native.decoder import OPERATIONS, Decoder
from betterhalf.rollout.native.kv_cache import KVCache

_LAST = OPERATIONS[-1]
_SLOT_MULTIPLE = 16


class _Recorder:
    """A tap that keeps the rows of one sequence and, when forced, passes on the given rows in their place."""

    def __init__(self, forced: Trace | None) -> None:
        self._forced = forced
        self._parts: dict[Place, list[Tensor]] = {}
        self._rows = slice(0, 0)
        self._first = 0
        self._prompt = False

    def aim(self, rows: slice, first: int, *, prompt: bool = False) -> None:
        """Record these rows of each result from now on.

        Args:
            rows: rows of the sequence.
            first: index in the sequence of the token in the first of them.
            prompt: the pass is a prompt pass, whose final norm has one row for each prompt and is left out.
        """
        self._rows, self._first, self._prompt = rows, first, prompt

    def __call__(self, operation: str, layer: int | None, result: Tensor) -> Tensor:
        """Record a result and return the value that the next operation reads; see `Tap`."""
        if operation == _LAST and self._prompt:
            return result
        kept = result[self._rows].clone()
        self._parts.setdefault((operation, layer), []).append(kept)
        # Nothing reads the last operation, and a decoded trace lacks it for the prompt.
        if self._forced is None or operation == _LAST:
            return result
        given = self._forced[operation, layer][self._first : self._first + kept.shape[0]]
        result = result.clone()
        result[self._rows] = given.view(kept.shape).to(result.dtype)
        return result

    def trace(self) -> Trace:
        """Return everything recorded, in the order of computation."""
        return {place: torch.cat(parts) for place, parts in self._parts.items()}


@torch.no_grad()
def whole_trace(decoder: Decoder, token_ids: tuple[int, ...], *, forced: Trace | None = None) -> Trace:
    """Run all tokens of one sequence in one pass."""
    decoder.reserve(len(token_ids))
    tokens = torch.tensor(token_ids, device=decoder.device)
    with _recording(decoder, forced) as recorder:
        recorder.aim(slice(0, len(token_ids)), 0)
        decoder.hidden_rows(tokens, (len(token_ids),))
    return recorder.trace()


@torch.no_grad()
def decoded_trace(
    decoder: Decoder, token_ids: tuple[int, ...], prompt_length: int, *, batch: int = 1, forced: Trace | None = None
) -> Trace:
    """Run the prompt in one pass and the other tokens one by one, as generation does.

    In a batch the sequence takes the middle slot; its neighbours are the same tokens, rotated by their distance from
    it. The final norm is traced for decoded tokens only.
    """
    slot, length = batch // 2, len(token_ids)
    decoder.reserve(length)
    tokens = torch.tensor(token_ids, device=decoder.device)
    tokens_BT = torch.stack([tokens.roll(index - slot) for index in range(batch)])
    cache = _cache(decoder, batch, length)
    with _recording(decoder, forced) as recorder:
        recorder.aim(slice(slot * prompt_length, (slot + 1) * prompt_length), 0, prompt=True)
        _, saved = decoder.prefill(tokens_BT[:, :prompt_length].flatten(), (prompt_length,) * batch)
        for index, prefix in enumerate(torch.split(saved, prompt_length, dim=2)):
            cache.fill(index, index + 1, prefix)
        for position in range(prompt_length, length):
            recorder.aim(slice(slot, slot + 1), position)
            lengths = torch.full((batch,), position, device=tokens.device)
            decoder.decode(tokens_BT[:, position], lengths, cache, position + 1)
    return recorder.trace()


def _cache(decoder: Decoder, slots: int, length: int) -> KVCache:
    """Allocate a cache as the engine does: lengths in multiples of 16, and FP32 storage on a CPU."""
    device = decoder.device
    dtype = torch.float32 if device.type == "cpu" else decoder.rounding.kv_dtype
    length = -(-length // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
    tiled = decoder.rounding.tiled
    return KVCache(decoder.config, slots=slots, max_length=length, dtype=dtype, device=device, tiled=tiled)


@contextmanager
def _recording(decoder: Decoder, forced: Trace | None) -> Iterator[_Recorder]:
    before, recorder = decoder.tap, _Recorder(forced)
    decoder.tap = recorder
    try:
        yield recorder
    finally:
        decoder.tap = before
