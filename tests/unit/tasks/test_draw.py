"""Counter-based draws and the stream of shuffles."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betterhalf.tasks.draw import distinct_stream, draw_int, shuffled, stream


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
def test_each_shuffle_covers_the_data_set_exactly_once(size: int, seed: int, turn: int) -> None:
    assert sorted(stream(size, turn * size, size, seed)) == list(range(size))


@settings(max_examples=50)
@given(size=st.integers(1, 20), position=st.integers(0, 60), count=st.integers(0, 60), cut=st.integers(0, 60))
def test_a_stream_read_in_two_parts_equals_the_stream_read_at_once(
    size: int, position: int, count: int, cut: int
) -> None:
    cut = min(cut, count)
    parts = stream(size, position, cut, 7) + stream(size, position + cut, count - cut, 7)
    assert parts == stream(size, position, count, 7)


@settings(max_examples=100)
@given(size=st.integers(1, 20), position=st.integers(0, 60), count=st.integers(0, 25), seed=st.integers(0, 9))
def test_a_step_repeats_no_prompt_and_moves_only_what_would_be_repeated(
    size: int, position: int, count: int, seed: int
) -> None:
    plain, found = stream(size, position, count, seed), distinct_stream(size, position, count, seed)
    if count > size:
        assert found == plain
        return
    assert len(set(found)) == count
    assert set(found) >= set(plain)
    first = [index not in plain[:place] for place, index in enumerate(plain)]
    if all(first):
        assert found == plain
    # A replacement may be an index that would have come later in the step; everything before it stays.
    seam = next((place for place, fresh in enumerate(first) if not fresh), count)
    assert found[:seam] == plain[:seam]
    for smaller in range(count):
        assert distinct_stream(size, position, smaller, seed) == found[:smaller]


def test_steps_of_a_whole_run_repeat_no_prompt_and_most_do_not_move() -> None:
    size, count = 161, 12  # shuffles meet within a step
    steps = range(0, 60 * size // count * count, count)
    plain = [stream(size, position, count, 3) for position in steps]
    found = [distinct_stream(size, position, count, 3) for position in steps]
    repeating = [index for index, step in enumerate(plain) if len(set(step)) < count]
    assert 0 < len(repeating) < 60
    assert all(len(set(step)) == count for step in found)
    assert [index for index, (left, right) in enumerate(zip(plain, found, strict=True)) if left != right] == repeating


@pytest.mark.parametrize(("first", "second"), [((50, 0, 0), (50, 1, 0)), ((50, 0, 0), (50, 0, 1))])
def test_seed_and_turn_change_the_order(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    assert shuffled(*first) != shuffled(*second)
    assert shuffled(*first) != tuple(range(50))
