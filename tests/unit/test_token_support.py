"""Kept tokens take the shorter of two encodings, written out by hand, and are read back."""

from __future__ import annotations

import random
import struct

import pytest

from betterhalf.token_support import TokenSupport, bitmap_words, decode, encode, joined, num_words


def test_few_tokens_are_ids_and_many_a_bitmap() -> None:
    support = encode([[40], [39, 2], [0, 3, 32]], [0.5, 0.75, 1.0], 41)
    assert support.counts == (1, 2, 3)
    assert support.masses == (0.5, 0.75, 1.0)
    # Two words hold the bits of 41 tokens: bits 0 and 3 of the first, bit 0 of the second.
    assert support.words == struct.pack("=3i", 40, 2, 39) + bytes([0b1001, 0, 0, 0, 1, 0, 0, 0])
    assert decode(support) == [(40,), (2, 39), (0, 3, 32)]


def test_the_whole_vocabulary_takes_no_words() -> None:
    support = encode([range(41), [5], range(41)], [1.0] * 3, 41)
    assert support.words == struct.pack("=i", 5)
    assert decode(support) == [tuple(range(41)), (5,), tuple(range(41))]


@pytest.mark.parametrize(("count", "words"), [(1, 1), (1536, 1536), (1537, 1536), (49151, 1536), (49152, 0)])
def test_a_position_takes_at_most_a_bit_for_each_token(count: int, words: int) -> None:
    assert num_words(count, 49152) == words <= bitmap_words(49152)


@pytest.mark.parametrize("vocabulary", [1, 7, 32, 33, 200])
def test_any_sets_are_read_back(vocabulary: int) -> None:
    draw = random.Random(vocabulary)
    sets = [sorted(draw.sample(range(vocabulary), draw.randint(1, vocabulary))) for _ in range(60)]
    support = encode(sets, [1.0] * 60, vocabulary)
    assert [list(token_ids) for token_ids in decode(support)] == sets
    assert len(support.words) == 4 * sum(num_words(len(token_ids), vocabulary) for token_ids in sets)


def test_parts_are_joined() -> None:
    parts = [encode([[1], range(9)], [0.1, 0.2], 9), encode([[8, 3]], [0.3], 9)]
    assert joined(parts) == encode([[1], range(9), [3, 8]], [0.1, 0.2, 0.3], 9)
    assert joined(parts[:1]) == parts[0]


@pytest.mark.parametrize(
    ("sets", "masses", "words"),
    [
        ([[]], [1.0], "position 0 must be one or more ids from 0 to 8"),
        ([[1], [9]], [1.0, 1.0], "position 1"),
        ([[-1]], [1.0], "position 0"),
        ([[1]], [], "1 positions have 0 masses"),
    ],
)
def test_what_no_sampler_can_keep_is_refused(sets: list[list[int]], masses: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(sets, masses, 9)


def test_a_support_prints_without_its_bytes() -> None:
    assert "words" not in repr(TokenSupport(vocabulary=9, counts=(1,), masses=(1.0,), words=bytes(4)))
