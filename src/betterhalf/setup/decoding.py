"""Decoding of a completion's tokens to the text that is graded and shown; defined only here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from betterhalf.types import Completion


def completion_texts(tokenizer: Any, completions: Sequence[Completion]) -> list[str]:
    """Decode completions as the model wrote them.

    A stop token at the end is removed if it is a special token, and so are the tokenizer's padding, start and end
    tokens at either end. Every other special token stays: tokenizers declare markers such as `</think>` special, and
    answer formats use them.
    """
    special = _special_ids(tokenizer)
    framing = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} & special
    bodies = [_body(completion, special, framing) for completion in completions]
    texts: list[str] = tokenizer.batch_decode(bodies, skip_special_tokens=False)
    return texts


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that `skip_special_tokens=True` would drop."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _body(completion: Completion, special: set[int], framing: set[int]) -> list[int]:
    token_ids = list(completion.with_observations())
    if completion.finish_reason == "stop" and token_ids[-1] in special:
        token_ids.pop()
    start, end = 0, len(token_ids)
    while start < end and token_ids[end - 1] in framing:
        end -= 1
    while start < end and token_ids[start] in framing:
        start += 1
    return token_ids[start:end]
