"""Counter-based random draws: each depends on its key alone, on every machine and in any order."""

from __future__ import annotations

import hashlib
from functools import lru_cache


def draw_int(low: int, high: int, *key: int) -> int:
    """Return an integer in [low, high], both ends included, determined by `key`."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return low + int.from_bytes(digest, "big") % (high - low + 1)


@lru_cache(maxsize=8)
def shuffled(size: int, seed: int, turn: int) -> tuple[int, ...]:
    """Return a permutation of range(size), determined by (seed, turn); `turn` numbers the shuffles of a stream."""

    def sort_key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed},{turn},{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(size), key=sort_key))


def stream(size: int, position: int, count: int, seed: int) -> list[int]:
    """Return `count` indices, from `position` on, of an endless stream of successive shuffles of range(size)."""
    places = (divmod(place, size) for place in range(position, position + count))
    return [shuffled(size, seed, turn)[offset] for turn, offset in places]


def distinct_stream(size: int, position: int, count: int, seed: int) -> list[int]:
    """Return `stream` without repetitions across the boundary of two shuffles, unless `count` exceeds `size`.

    An index that is already among these `count` is replaced by the last free one of the new shuffle, so that every
    other index keeps its place. The result for a smaller `count` is a prefix of the result for a larger one.
    """
    indices = stream(size, position, count, seed)
    if count > size or len(set(indices)) == count:
        return indices
    spare = iter(reversed(shuffled(size, seed, (position + count - 1) // size)))
    taken: dict[int, None] = {}
    for index in indices:
        taken[index if index not in taken else next(other for other in spare if other not in taken)] = None
    return list(taken)
