"""Completions that attack the grader of mathematics: every one is graded in time, and nothing is lost."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from betterhalf.tasks.math_grader import MathGrader
from betterhalf.types import Prompt

SECONDS = 1.0
GOLD = Prompt(prompt_id="p", text="", token_ids=(1,), answer="3")
MIB = 2**20


def deep(draw: random.Random) -> str:
    depth = draw.choice([50, 500, 5_000, 100_000])
    opened, closed = draw.choice(
        [("(", ")"), ("{", "}"), (r"\sqrt{", "}"), (r"\frac{1}{", "}"), (r"\left(", r"\right)")]
    )
    return rf"\boxed{{{opened * depth}{draw.randrange(10)}{closed * depth}}}"


def powers(draw: random.Random) -> str:
    tower = "^{".join([str(draw.randrange(2, 10**3))] * draw.randrange(3, 7))
    return rf"\boxed{{{tower}{'}' * tower.count('{')}}}"


def large_numbers(draw: random.Random) -> str:
    digits = str(draw.randrange(1, 10)) * draw.choice([100, 5_000, 50_000])
    return rf"\boxed{{{draw.choice([digits, digits + '!', f'10^{{{digits}}}', f'{digits}/{digits}', f'1e{digits}'])}}}"


def unbalanced(draw: random.Random) -> str:
    marks = [r"\boxed{", "{", "}", r"\frac{", "(", ")", "$", r"\left[", "|", "3"]
    return r"\boxed{" + "".join(draw.choice(marks) for _ in range(draw.choice([5, 50, 2_000])))


def null_bytes(draw: random.Random) -> str:
    odd = ["\0", "\x1b", "\ud800", "\ufeff", "\u202e", "\U0001f600", "\r", "3", "+"]
    return r"\boxed{" + "".join(draw.choice(odd) for _ in range(draw.choice([1, 20, 1_000]))) + "}"


def megabytes(draw: random.Random) -> str:
    piece = draw.choice(["1+", "x", r"\frac{1}{2}+", "(", r"\boxed{3}", " ", "\\", "9"])
    inside = piece * (MIB // len(piece))
    return draw.choice([rf"\boxed{{{inside}1}}", inside])


def commands(draw: random.Random) -> str:
    found = [
        r"\int_0^{10^{9}}e^{x^2}dx",
        r"\sum_{n=1}^{10^{12}}n^{-n}",
        r"\prod_{k=1}^{10^9}k",
        r"\binom{10^9}{5\cdot10^8}",
    ]
    found += [
        r"\begin{pmatrix}" + r"1&2\\" * 500 + r"\end{pmatrix}",
        r"\input{/etc/passwd}",
        "__import__('os')._exit(1)",
    ]
    return rf"\boxed{{{draw.choice(found)}}}"


def right(draw: random.Random) -> str:
    return draw.choice([r"so it is \boxed{3}", r"\boxed{6/2}", r"\boxed{\sqrt{9}}", r"\boxed{3.0}"])


WAYS: dict[Callable[[random.Random], str], int] = {
    deep: 120,
    powers: 60,
    large_numbers: 100,
    unbalanced: 700,
    null_bytes: 700,
    megabytes: 40,
    commands: 100,
    right: 180,
}
"""Number of completions of each way; the first three take most of their time limit."""
COUNTED = (powers, large_numbers, right)
"""Ways of which every completion is right, or counted as a time-out or an answer that cannot be read; `deep` is none
of them, since a nest of 50 fractions is a number, and may be read in time and found wrong."""


@pytest.fixture
def grader() -> Iterator[MathGrader]:
    grader = MathGrader("chat", seconds=SECONDS, workers=2)
    grader.check_golds(["3"])
    yield grader
    grader.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_2000_hostile_completions_are_graded_within_their_limits(grader: MathGrader) -> None:
    draw = random.Random(15)
    ways = [way for way, count in WAYS.items() for _ in range(count)]
    texts = [way(draw) for way in ways]
    assert len(texts) == 2000
    started = time.monotonic()
    rewards = grader.rewards([GOLD] * len(texts), texts, ["stop"] * len(texts))
    seconds = time.monotonic() - started
    solved = Counter(way.__name__ for way, reward in zip(ways, rewards, strict=True) if reward)
    assert set(rewards) <= {0.0, 1.0}
    assert solved["right"] == WAYS[right]
    assert solved.keys() <= {"right", "deep", "unbalanced", "null_bytes", "megabytes"}, solved
    assert grader.timeouts + grader.unparsed_answers + sum(solved.values()) <= 2000
    assert seconds < len(texts) * SECONDS
    assert grader.timeouts > 0 and grader.unparsed_answers > 100


@pytest.mark.parametrize("way", list(WAYS), ids=lambda way: way.__name__)
def test_a_few_completions_of_each_way_are_graded_in_time(
    grader: MathGrader, way: Callable[[random.Random], str]
) -> None:
    draw = random.Random(3)
    texts = [way(draw) for _ in range(4)] + [r"\boxed{12/4}"]
    started = time.monotonic()
    rewards = grader.rewards([GOLD] * 5, texts, ["stop"] * 5)
    assert time.monotonic() - started < 5 * (SECONDS + 8)
    assert rewards[-1] == 1.0
    assert sum(rewards) + grader.timeouts + grader.unparsed_answers >= (5 if way in COUNTED else 1)
