"""pass@k and maj@k equal the enumeration of all subsets, in fractions."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest

from betterhalf.diagnostics import accuracy
from betterhalf.diagnostics.accuracy import EXACT_SAMPLES, majority_at, pass_at


def enumerated_pass(solved: int, samples: int, k: int) -> Fraction:
    subsets = list(combinations([index < solved for index in range(samples)], k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


def vote(ballots: tuple[str | None, ...], gold: str) -> Fraction:
    """Return the chance that the most frequent answer is `gold`, with ties by lot."""
    counts = Counter(answer for answer in ballots if answer is not None)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return Fraction(winners.count(gold), len(winners)) if winners else Fraction(0)


def enumerated_majority(answers: list[str | None], gold: str, k: int) -> Fraction:
    subsets = list(combinations(answers, k))
    return sum((vote(subset, gold) for subset in subsets), Fraction()) / len(subsets)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(samples: int) -> None:
    for solved in range(samples + 1):
        for k in range(1, samples + 1):
            assert pass_at(solved, samples, k) == float(enumerated_pass(solved, samples, k))


def test_pass_at_k_stays_exact_where_a_difference_of_floats_would_cancel() -> None:
    assert pass_at(1, 10**9, 1) == 1e-9
    assert pass_at(1, 10**12, 3) == 3e-12
    assert pass_at(0, 4096, 4096) == 0
    assert pass_at(2000, 4096, 2097) == 1


def test_pass_at_k_is_unbiased() -> None:
    """The mean over all outcomes of n independent tries is the chance that k tries solve the prompt."""
    chance, samples = Fraction(3, 10), 6
    for k in range(1, samples + 1):
        expected = Fraction(0)
        for solved in range(samples + 1):
            ways = len(list(combinations(range(samples), solved)))
            expected += ways * chance**solved * (1 - chance) ** (samples - solved) * enumerated_pass(solved, samples, k)
        assert expected == 1 - (1 - chance) ** k
        found = sum(
            len(list(combinations(range(samples), c))) * 0.3**c * 0.7 ** (samples - c) * pass_at(c, samples, k)
            for c in range(samples + 1)
        )
        assert found == pytest.approx(float(expected), rel=1e-12)


BALLOTS: list[list[str | None]] = [
    ["a"],
    [None],
    [None, None, "b"],
    ["a", "b"],
    ["a", "a", "b", "b", "c", None, "d"],
    ["a", "a", "a", "b", "b", "b", "c", "c"],
    ["b", "c", "d", "e", None, "a"],
    ["a", "b", "b", "b", "c", "c", "c", None, None],
]


@pytest.mark.parametrize("ballots", BALLOTS, ids=str)
def test_the_majority_vote_is_the_mean_over_all_subsets(ballots: list[str | None]) -> None:
    for gold in ("a", "b", "z"):
        solved = [answer == gold for answer in ballots]
        for k in range(1, len(ballots) + 1):
            assert majority_at(ballots, solved, k) == float(enumerated_majority(ballots, gold, k))


def test_random_ballots_agree_with_their_enumeration() -> None:
    generator = random.Random(0)
    for _ in range(40):
        ballots = [generator.choice(["a", "b", "c", "d", None]) for _ in range(generator.randint(2, 9))]
        k = generator.randint(1, len(ballots))
        assert majority_at(ballots, [answer == "a" for answer in ballots], k) == float(
            enumerated_majority(ballots, "a", k)
        )


def test_a_vote_of_one_is_the_share_of_right_answers() -> None:
    ballots = ["a", "b", None, "a", "c"]
    assert majority_at(ballots, [answer == "a" for answer in ballots], 1) == 0.4


def test_drawn_subsets_estimate_the_exact_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more than `EXACT_SAMPLES` completions, subsets are drawn, the same ones every time."""
    ballots = [*["a"] * 11, *["b"] * 9, *["c"] * 6, *[None] * 4]
    solved = [answer == "a" for answer in ballots]
    exact = [majority_at(ballots, solved, k) for k in (2, 8, 29)]
    monkeypatch.setattr(accuracy, "EXACT_SAMPLES", 8)
    drawn = [majority_at(ballots, solved, k) for k in (2, 8, 29)]
    assert drawn == [majority_at(ballots, solved, k) for k in (2, 8, 29)]
    assert drawn == pytest.approx(exact, abs=0.04) and drawn != exact
    # All of them together are a single subset, which is never drawn.
    assert majority_at(ballots, solved, 30) == 1
    assert EXACT_SAMPLES == 64


def test_many_different_answers_of_many_completions_take_no_time() -> None:
    ballots: list[str | None] = [str(index // 2) for index in range(64)]
    solved = [answer == "0" for answer in ballots]
    assert majority_at(ballots, solved, 64) == pytest.approx(1 / 32, rel=1e-12)
    assert majority_at(ballots, solved, 1) == pytest.approx(1 / 32, rel=1e-12)
    assert majority_at(ballots, solved, 32) == pytest.approx(1 / 32, rel=1e-12)  # by symmetry
