"""Counter-based random numbers, and the draws made from them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from betterhalf.rollout.sampler import Distribution, draw, draw_at, sequence_key, truncated, uniforms

SMALLEST = 0.5 * 2.0**-52
LARGEST = 1.0 - 2.0**-53


def test_the_stream_is_splitmix64():
    # Published outputs of SplitMix64 for seed 1234567.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    expected = [((output >> 12) + 0.5) / 2**52 for output in outputs]
    found = uniforms(torch.full((5,), 1234567), torch.arange(5))
    assert found.dtype == torch.float64
    assert found.tolist() == expected


def test_uniform_numbers_fill_the_open_interval_evenly():
    keys = torch.tensor([sequence_key((3, step, prompt), 1) for step in range(100) for prompt in range(100)])
    found = uniforms(keys.repeat_interleave(10), torch.arange(10).repeat(10_000))
    assert found.min() >= SMALLEST and found.max() <= LARGEST
    counts = torch.histc(found.float(), bins=64, min=0.0, max=1.0).double()
    expected = found.numel() / 64
    # 63 degrees of freedom: 120 is exceeded with probability 2e-5.
    assert ((counts - expected) ** 2 / expected).sum() < 120


def test_neighbouring_positions_and_siblings_are_uncorrelated():
    keys = torch.tensor([sequence_key((0, 0, 0), sibling) for sibling in range(2000)])
    grid = uniforms(keys.repeat_interleave(50), torch.arange(50).repeat(2000)).view(2000, 50) - 0.5
    scale = 12 / grid.numel() ** 0.5
    assert abs((grid[:, 1:] * grid[:, :-1]).sum()) / grid.numel() ** 0.5 * 12 < 5
    assert abs((grid[1:] * grid[:-1]).sum()) * scale < 5


def test_every_part_of_the_key_makes_another_stream():
    keys = {sequence_key((a, b, c), d) for a, b, c, d in itertools.product(range(6), repeat=4)}
    assert len(keys) == 6**4
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_a_later_position_continues_the_stream():
    positions = torch.arange(6)
    for sibling in range(50):
        whole = uniforms(torch.full((6,), sequence_key((3, 1, 4), sibling)), positions)
        rest = uniforms(torch.full((2,), sequence_key((3, 1, 4), sibling, 4)), positions[:2])
        assert rest.tolist() == whole[4:].tolist()


def test_a_huge_seed_is_accepted():
    assert sequence_key((2**80 + 1, 0, 0), 0) == sequence_key(((2**80 + 1) % 2**64, 0, 0), 0)


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(6, 3)
    uniform = torch.tensor([SMALLEST, 0.499, 0.501, 0.749, 0.751, LARGEST], dtype=torch.float64)
    assert draw(logits, uniform, 1.0).token_ids.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("uniform", [SMALLEST, 0.25, 0.5, LARGEST])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    logits = torch.full((1, 9), -1e4)
    logits[0, 4] = 3.0
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0).token_ids.item() == 4


def test_no_uniform_number_reaches_a_trailing_or_leading_zero_at_a_large_vocabulary():
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = logits[:, -100:] = -300.0
    uniform = torch.tensor([SMALLEST, LARGEST], dtype=torch.float64).repeat(32)
    token_ids = draw(logits, uniform, 1.0).token_ids
    assert token_ids.min() >= 100 and token_ids.max() < 49_900


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature):
    row = torch.tensor([1.0, -2.0, 0.3, 0.0, 2.5, -1e9, 1.1, -0.4])
    count = 40_000
    uniform = uniforms(torch.full((count,), sequence_key((1, 2, 3), 4)), torch.arange(count))
    drawn = draw(row.expand(count, -1), uniform, temperature)
    probabilities = (row.double() / temperature).softmax(-1)
    counts = torch.bincount(drawn.token_ids, minlength=8).double()
    assert counts[5] == 0
    kept = probabilities > 0
    chi2 = ((counts - count * probabilities)[kept] ** 2 / (count * probabilities[kept])).sum()
    # 6 degrees of freedom: 30 is exceeded with probability 4e-5.
    assert chi2 < 30
    torch.testing.assert_close(drawn.logprobs.double(), probabilities.log()[drawn.token_ids], rtol=0, atol=1e-6)


def test_a_row_gets_the_same_draw_in_any_batch():
    logits = 3 * torch.randn(40, 100, generator=torch.Generator().manual_seed(1))
    uniform = uniforms(torch.arange(40), torch.zeros(40, dtype=torch.int64))
    together = draw(logits, uniform, 1.0)
    for row in (0, 17, 39):
        alone = draw(logits[row : row + 1], uniform[row : row + 1], 1.0)
        assert alone.token_ids.item() == together.token_ids[row].item()
        assert alone.logprobs.item() == together.logprobs[row].item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_marks_its_row_only(bad):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    assert draw(logits, torch.full((3,), 0.5, dtype=torch.float64), 1.0).finite.tolist() == [True, False, True]


LIKELIEST = torch.tensor([[0.02, 0.4, 0.05, 0.3, 0.08, 0.15]]).log() * 2
"""Probabilities 0.02 to 0.4 at temperature 2."""


@pytest.mark.parametrize(
    ("choices", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 5]),
        ({"min_p": 0.19}, [1, 3, 4, 5]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # of the three, 0.4 and 0.3 are 0.82
        ({"min_p": 0.3, "top_k": 5, "top_p": 0.99}, [1, 3, 5]),
    ],
)
def test_truncation_by_hand_and_the_frequencies_that_follow(choices, kept):
    wanted = Distribution(temperature=2.0, **choices)
    left = truncated(LIKELIEST / 2.0, wanted)
    assert left[0].isfinite().nonzero().squeeze(1).tolist() == kept
    count = 20_000
    drawn = draw_at(LIKELIEST.expand(count, -1), torch.arange(count), torch.zeros(count, dtype=torch.int64), wanted)
    expected = left[0].double().softmax(-1)
    assert bool(drawn.finite.all())
    torch.testing.assert_close(drawn.logprobs.double(), expected.log()[drawn.token_ids], rtol=0, atol=1e-6)
    found = torch.bincount(drawn.token_ids, minlength=6) / count
    # Standard deviation of a frequency: at most 0.0036.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.015)


def test_a_truncation_that_keeps_everything_changes_no_draw():
    generator = torch.Generator().manual_seed(3)
    logits, keys = torch.randn(50, 700, generator=generator), torch.arange(50)
    positions = torch.full((50,), 4)
    plain = draw_at(logits, keys, positions, Distribution(temperature=0.7))
    whole = draw_at(logits, keys, positions, Distribution(temperature=0.7, top_k=700))
    assert torch.equal(plain.token_ids, whole.token_ids) and torch.equal(plain.logprobs, whole.logprobs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_truncated_row_with_a_broken_logit_is_still_found(bad):
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    wanted = Distribution(temperature=1.0, top_k=2, top_p=0.9)
    assert draw_at(logits, torch.arange(2), torch.arange(2), wanted).finite.tolist() == [True, False]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_most_likely_tokens_have_the_logprobs_of_the_whole_distribution(temperature: float) -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(2)) * 3
    keys, positions = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    plain = draw_at(logits, keys, positions, Distribution(temperature=temperature))
    drawn = draw_at(logits, keys, positions, Distribution(temperature=temperature, top_tokens=650))
    assert torch.equal(drawn.token_ids, plain.token_ids) and torch.equal(drawn.logprobs, plain.logprobs)
    assert plain.top is None and drawn.top is not None
    ids, logprobs = drawn.top
    expected = (logits.double() / temperature).log_softmax(-1).sort(dim=-1, descending=True)
    assert torch.equal(ids, expected.indices[:, :650])
    torch.testing.assert_close(logprobs.double(), expected.values[:, :650], rtol=1e-6, atol=1e-6)
    own = ids == drawn.token_ids.unsqueeze(1)
    assert torch.equal(logprobs[own], drawn.logprobs)
