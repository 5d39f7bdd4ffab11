"""The tokens that truncated sampling could draw at each position of a completion, in a compact layout.

The tokens of one position take a whole number of 32-bit words, `num_words`. They are their ids in ascending order, or a
bitmap of the vocabulary (bit v % 8 of byte v // 8) where that is shorter. The whole vocabulary takes no word at all.
Ids are in the byte order of the machine. `TopTokens` has the most likely tokens at each position, with their logprobs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSupport:
    """Tokens that truncated sampling (top-p, top-k, min-p) could draw at each position of a completion.

    `encode` and `decode` convert it from and to sets of ids.
    """

    vocabulary: int
    """Number of token ids."""
    counts: tuple[int, ...]
    """Number of tokens that could be drawn at each position; at least one."""
    masses: tuple[float, ...]
    """Share of the probability before truncation that these tokens had, at each position."""
    words: bytes = field(repr=False)
    """The tokens of each position in turn, in 32-bit words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSupport:
    """`TokenSupport` of the C completion tokens of a pack: the set over which each one's distribution is normalised."""

    vocabulary: int
    """Number of token ids."""
    counts_C: Tensor
    """int64 [C]: number of tokens in each set."""
    words_K: Tensor
    """int32 [K]: the sets of all tokens in turn; see `TokenSupport`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopTokens:
    """The K tokens that the engine found most likely at each position of a completion of C tokens, in host memory."""

    token_ids_CK: Tensor
    """int64 [C, K], most likely first."""
    logprobs_CK: Tensor
    """float32 [C, K]: log mu, normalised over the whole vocabulary."""


def bitmap_words(vocabulary: int) -> int:
    """Return the number of words of a bitmap."""
    return -(-vocabulary // 32)


def num_words(count: int, vocabulary: int) -> int:
    """Return the number of words that `count` tokens of a vocabulary take."""
    return 0 if count == vocabulary else min(count, bitmap_words(vocabulary))


def encode(sets: Sequence[Iterable[int]], masses: Sequence[float], vocabulary: int) -> TokenSupport:
    """Return the support of a completion.

    Args:
        sets: ids of the tokens that could be drawn at each position, in any order, at least one.
        masses: their share of the probability before truncation, for each position.
        vocabulary: number of token ids.

    Raises:
        ValueError: a set is empty or holds an id outside the vocabulary, or there is another number of masses.
    """
    if len(masses) != len(sets):
        raise ValueError(f"{len(sets)} positions have {len(masses)} masses; give one for each")
    ordered = [sorted(set(token_ids)) for token_ids in sets]
    for position, token_ids in enumerate(ordered):
        if not token_ids or token_ids[0] < 0 or token_ids[-1] >= vocabulary:
            raise ValueError(
                f"the tokens of position {position} must be one or more ids from 0 to {vocabulary - 1}, the vocabulary"
            )
    return TokenSupport(
        vocabulary=vocabulary,
        counts=tuple(map(len, ordered)),
        masses=tuple(masses),
        words=b"".join(_words(token_ids, vocabulary) for token_ids in ordered),
    )


def decode(support: TokenSupport) -> list[tuple[int, ...]]:
    """Return the ids of the tokens that could be drawn at each position, ascending."""
    sets, start = [], 0
    for count in support.counts:
        stop = start + 4 * num_words(count, support.vocabulary)
        sets.append(_ids(count, support.words[start:stop], support.vocabulary))
        start = stop
    return sets


def joined(parts: Sequence[TokenSupport]) -> TokenSupport:
    """Return the support of a completion that was sampled in several parts, at least one, of the same vocabulary."""
    (vocabulary,) = {part.vocabulary for part in parts}
    return TokenSupport(
        vocabulary=vocabulary,
        counts=tuple(count for part in parts for count in part.counts),
        masses=tuple(mass for part in parts for mass in part.masses),
        words=b"".join(part.words for part in parts),
    )


def _words(token_ids: list[int], vocabulary: int) -> bytes:
    size = num_words(len(token_ids), vocabulary)
    if size == len(token_ids):
        return array("i", token_ids).tobytes()
    bitmap = bytearray(4 * size)
    for token_id in token_ids if size else ():
        bitmap[token_id >> 3] |= 1 << (token_id & 7)
    return bytes(bitmap)


def _ids(count: int, words: bytes, vocabulary: int) -> tuple[int, ...]:
    if count == vocabulary:
        return tuple(range(vocabulary))
    if 4 * count == len(words):
        return tuple(memoryview(words).cast("i"))
    return tuple(token_id for token_id in range(vocabulary) if words[token_id >> 3] >> (token_id & 7) & 1)
