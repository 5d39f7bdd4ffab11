"""Checks of requests, sequences and scores that all rollout engines share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from betterhalf.errors import EngineNumericsError, InputError
from betterhalf.precision.formats import FORMATS
from betterhalf.types import DtypeName, GenerateRequest


def stop_ids(token_ids: Iterable[int], vocabulary: int) -> tuple[int, ...]:
    """Return the tokens that end a completion, sorted and without duplicates.

    Raises:
        InputError: one is not in the vocabulary, so that it could never be sampled.
    """
    found = tuple(sorted(set(token_ids)))
    for token_id in found:
        if not 0 <= token_id < vocabulary:
            raise InputError(
                f"stop token {token_id} is not in the model's vocabulary of {vocabulary} tokens; name the tokens that "
                "end a completion with model.stop_tokens"
            )
    return found


def check_requests(requests: Iterable[GenerateRequest], context_length: int, vocabulary: int) -> None:
    """Refuse prompts that an engine cannot continue.

    Args:
        requests: all requests of one call; messages name a prompt without an id by its index.
        context_length: positions the model can attend over.
        vocabulary: size of the model's vocabulary.

    Raises:
        InputError: a prompt is empty, leaves no room in the context for one more token, or holds a token outside the
            vocabulary.
    """
    for index, request in enumerate(requests):
        check_request(request, request.label(index), context_length, vocabulary)


def check_request(request: GenerateRequest, label: str, context_length: int, vocabulary: int) -> None:
    """Refuse a prompt, named `label` in the message; see `check_requests`."""
    length = len(request.token_ids)
    if not 0 < length < context_length:
        raise InputError(
            f"{label} has {length} tokens, but the model's context of {context_length} must hold it and one token "
            "more; shorten or drop it"
        )
    _check_vocabulary(label, request.token_ids, vocabulary)


def check_sequences(sequences: Iterable[Sequence[int]], context_length: int, vocabulary: int) -> None:
    """Refuse sequences that an engine cannot score; see `RolloutEngine.score`.

    Raises:
        InputError: a sequence has fewer than two tokens, exceeds the context, or holds a token outside the vocabulary.
    """
    for index, token_ids in enumerate(sequences):
        if not 1 < len(token_ids) <= context_length:
            raise InputError(
                f"sequence {index} has {len(token_ids)} tokens; the engine scores 2 to {context_length}, the model's "
                "context; shorten or drop it"
            )
        _check_vocabulary(f"sequence {index}", token_ids, vocabulary)


def require_finite_scores(scores: Iterable[Sequence[float]], dtype: str, explain: Callable[[], str]) -> None:
    """Refuse logprobs that are not finite.

    Args:
        scores: logprobs of each sequence.
        dtype: name of the format that the engine computes in.
        explain: returns the reason and the fix for the message; called only on an error.

    Raises:
        EngineNumericsError: a logprob is NaN or infinite.
    """
    for index, logprobs in enumerate(scores):
        if not all(map(math.isfinite, logprobs)):
            raise EngineNumericsError(f"sequence {index}: its logprobs are not finite in {dtype}: {explain()}")


_ROUNDOFFS, _RELATIVE = 64, 16
"""Tolerance in unit roundoffs of the coarser format: absolute, and relative to the mean logprob, since rounding
errors grow with it. Rounding alone causes up to about a tenth of it (docs/engines.md has the measurements)."""
_FLOOR = 1e-3
"""Smallest tolerance, in nats: even in fine formats, other orders of summation differ."""


def score_tolerance(formats: Iterable[DtypeName], mean_logprob: float) -> float:
    """Return the mean absolute difference of logprobs of the same tokens, in nats, that rounding may cause.

    It is the largest of 1e-3, 64 unit roundoffs, and 16 unit roundoffs times the mean absolute logprob.

    Args:
        formats: formats that the compared sides compute in; the coarsest counts.
        mean_logprob: mean logprob of the tokens, in nats.
    """
    roundoff = max(FORMATS[name].unit_roundoff for name in formats)
    return max(_FLOOR, roundoff * max(_ROUNDOFFS, _RELATIVE * abs(mean_logprob)))


def _check_vocabulary(label: str, token_ids: Sequence[int], vocabulary: int) -> None:
    if not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
        raise InputError(
            f"{label} holds a token outside the model's vocabulary of {vocabulary}; use the model's own tokenizer"
        )
