"""Padding of a vocabulary: rows of embedding and LM head beyond the tokens that the tokenizer knows.

Models are padded so that their sizes suit a GPU. The padding rows are left out when weights are loaded: trainer and
engines compute a model with the smaller vocabulary, so no padding id is ever sampled, and logprobs on both sides are
those of one distribution, over tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from betterhalf.models.stop_tokens import StopToken


def known_tokens(hf_config: Any, tokenizer: Any, stops: Sequence[StopToken]) -> int:
    """Return the number of ids up to the last that the tokenizer, the configuration or a stop token names.

    Ids beyond the embedding do not count.
    """
    rows = int(hf_config.vocab_size)
    named: tuple[int, ...] = (*tokenizer.get_vocab().values(), *_special(hf_config), *(stop.token_id for stop in stops))
    return 1 + max(token_id for token_id in named if token_id < rows)


def _special(hf_config: Any) -> Iterator[int]:
    """Yield the ids of special tokens; the embedding's padding row is one of them."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(hf_config, key, None)
        yield from () if value is None else (value,) if isinstance(value, int) else value


def padding_notes(name: str, rows: int, known: int) -> tuple[str, ...]:
    """Return a note on padding that is left out."""
    if rows == known:
        return ()
    return (
        f"the vocabulary of model {name!r} is padded: {rows - known} of its {rows} ids have no token; they are left "
        f"out, so they are never sampled, and an export has {known} rows",
    )
