"""Counter-based draws and the stream of shuffles."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betterhalf.tasks.draw import draw_int, shuffled, stream


def test_a_draw_is_the_same_on_every_machine() -> None:
    # printf 0,0,0 | b2sum -l 64 prints 3f3e1c8e57a282fe.
    assert draw_int(1, 9, 0, 0, 0) == 1 + 0x3F3E1C8E57A282FE % 9 == 5


def test_draws_cover_their_range_evenly() -> None:
    counts = Counter(draw_int(1, 9, 3, index) for index in range(9000))
    assert set(counts) == set(range(1, 10))
    # 1000 expected each, standard deviation 30.
    assert all(880 < count < 1120 for count in counts.values())


def test_neighbouring_keys_give_unrelated_draws() -> None:
    assert len({draw_int(0, 2**63, seed, index) for seed in range(20) for index in range(20)}) == 400
    assert draw_int(0, 2**63, 1, 23) != draw_int(0, 2**63, 12, 3)


@settings(max_examples=50)
@given(size=st.integers(1, 40), seed=st.integers(0, 1000), turn=st.integers(0, 5))
def test_each_turn_covers_the_data_set_exactly_once(size: int, seed: int, turn: int) -> None:
    assert sorted(stream(size, turn * size, size, seed)) == list(range(size))


@settings(max_examples=50)
@given(size=st.integers(1, 20), position=st.integers(0, 60), count=st.integers(0, 60), cut=st.integers(0, 60))
def test_a_stream_read_in_two_parts_equals_the_stream_read_at_once(
    size: int, position: int, count: int, cut: int
) -> None:
    cut = min(cut, count)
    parts = stream(size, position, cut, 7) + stream(size, position + cut, count - cut, 7)
    assert parts == stream(size, position, count, 7)


@pytest.mark.parametrize(("first", "second"), [((50, 0, 0), (50, 1, 0)), ((50, 0, 0), (50, 0, 1))])
def test_seed_and_turn_change_the_order(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    assert shuffled(*first) != shuffled(*second)
    assert shuffled(*first) != tuple(range(50))
