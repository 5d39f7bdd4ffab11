"""Accuracy of several completions of a prompt: pass@k and maj@k, estimated from n >= k sampled completions.

pass@k is the chance that at least one of k completions solves a prompt; 1 - C(n - c, k) / C(n, k), with c of n solved,
is unbiased (arXiv 2107.03374). maj@k is the chance that the majority vote of k completions is right. Both are
expectations over subsets of k completions, drawn without replacement. Integer arithmetic avoids cancellation.

In a vote, completions without an answer abstain. The most frequent answer wins, ties are broken at random, and a prompt
without any vote is not solved.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import comb

EXACT_SAMPLES = 64
"""Largest number of completions for which maj@k is exact, a sum over all subsets; with more, subsets are drawn."""

DRAWN_SUBSETS = 1000
"""Number of subsets drawn where there are too many completions to sum over all of them."""


def pass_at(solved: int, samples: int, k: int) -> float:
    """Return the chance that at least one of k completions solves the prompt.

    Args:
        solved: number of completions that solve it.
        samples: number of completions.
        k: from 1 to `samples`.
    """
    total = comb(samples, k)
    return (total - comb(samples - solved, k)) / total


def majority_at(answers: Sequence[str | None], solved: Sequence[bool], k: int) -> float:
    """Return the chance that the majority vote of k completions is right.

    Args:
        answers: the answer of each completion; None for a completion that abstains.
        solved: true for each completion whose answer is right.
        k: from 1 to the number of completions.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    right = {answer: _share(answers, solved, answer) for answer in counts}
    if len(answers) > EXACT_SAMPLES and k < len(answers):
        return _drawn_majority(answers, right, k)
    abstaining = len(answers) - sum(counts.values())
    chances = (right[answer] * _wins(answer, counts, abstaining, k) for answer in counts if right[answer])
    return float(sum(chances, Fraction()))


def _share(answers: Sequence[str | None], solved: Sequence[bool], answer: str) -> Fraction:
    """Return the share of right completions among those that give `answer`: 0 or 1 if the grader is consistent."""
    found = [right for given, right in zip(answers, solved, strict=True) if given == answer]
    return Fraction(sum(found), len(found))


def _wins(answer: str, counts: Counter[str], abstaining: int, k: int) -> Fraction:
    rivals = tuple(sorted(count for other, count in counts.items() if other != answer))
    return _chance_to_win(counts[answer], rivals, abstaining, k)


@lru_cache(maxsize=4096)
def _chance_to_win(votes: int, rivals: tuple[int, ...], abstaining: int, k: int) -> Fraction:
    """Return the chance that an answer wins the vote of k completions.

    Args:
        votes: number of all completions that give the answer.
        rivals: number of completions that give each other answer.
        abstaining: number of completions without an answer.
        k: size of the vote.
    """
    ways = Fraction()
    for drawn in range(1, min(votes, k) + 1):
        ways += comb(votes, drawn) * _ways_not_to_lose(drawn, rivals, abstaining, k - drawn)
    return ways / comb(votes + sum(rivals) + abstaining, k)


def _ways_not_to_lose(drawn: int, rivals: tuple[int, ...], abstaining: int, rest: int) -> Fraction:
    """Return the number of ways to draw `rest` others with no rival above `drawn`; a tie with t rivals counts 1/(t+1).

    Rivals with fewer than `drawn` completions cannot tie, and are drawn together with those that abstain.
    """
    strong = [count for count in rivals if count >= drawn]
    weak = sum(rivals) - sum(strong) + abstaining
    ways = {(0, 0): 1}
    """(number drawn, number of tied rivals) -> number of ways."""
    for count in strong:
        longer: dict[tuple[int, int], int] = {}
        for (taken, equals), number in ways.items():
            for own in range(min(drawn, rest - taken) + 1):
                place = (taken + own, equals + (own == drawn))
                longer[place] = longer.get(place, 0) + number * comb(count, own)
        ways = longer
    return sum(
        (Fraction(number * comb(weak, rest - taken), equals + 1) for (taken, equals), number in ways.items()),
        Fraction(),
    )


def _drawn_majority(answers: Sequence[str | None], right: dict[str, Fraction], k: int) -> float:
    """Estimate the chance from seeded subsets; its standard error is at most 0.016 for a prompt."""
    generator = random.Random(f"majority-{k}-{len(answers)}")
    results = []
    for _ in range(DRAWN_SUBSETS):
        counts = Counter(answer for answer in generator.sample(answers, k) if answer is not None)
        best = max(counts.values(), default=0)
        winners = [right[answer] for answer, count in counts.items() if count == best]
        results.append(float(sum(winners) / len(winners)) if winners else 0.0)
    return statistics.fmean(results)
