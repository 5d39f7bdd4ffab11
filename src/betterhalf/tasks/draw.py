"""Numbers drawn by counter: each depends on its key alone, on every machine and in every order."""

from __future__ import annotations

import hashlib
from functools import lru_cache


def draw_int(low: int, high: int, *key: int) -> int:
    """An integer of [low, high], both included, determined by `key`."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return low + int.from_bytes(digest, "big") % (high - low + 1)


@lru_cache(maxsize=8)
def shuffled(size: int, seed: int, turn: int) -> tuple[int, ...]:
    """A permutation of range(size), determined by (seed, turn)."""

    def sort_key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed},{turn},{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(size), key=sort_key))


def stream(size: int, position: int, count: int, seed: int) -> list[int]:
    """Indices `position` to `position + count` of an endless stream: one shuffle of range(size) after another."""
    places = (divmod(place, size) for place in range(position, position + count))
    return [shuffled(size, seed, turn)[offset] for turn, offset in places]


def distinct_stream(size: int, position: int, count: int, seed: int) -> list[int]:
    """`stream` without a repetition where two shuffles meet; with one if `count` exceeds `size`.

    An index that was among these `count` already is replaced by the one that comes last in the new shuffle, so every
    other index keeps its place. What is returned for a smaller `count` is the beginning of what a larger one returns.
    """
    indices = stream(size, position, count, seed)
    if count > size or len(set(indices)) == count:
        return indices
    spare = iter(reversed(shuffled(size, seed, (position + count - 1) // size)))
    taken: dict[int, None] = {}
    for index in indices:
        taken[index if index not in taken else next(other for other in spare if other not in taken)] = None
    return list(taken)
