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
