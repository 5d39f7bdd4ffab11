"""Grading in processes that are killed when they take too long."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator

import pytest

from betterhalf.tasks.math_grader import MathGrader
from betterhalf.types import Prompt


def prompt(answer: str) -> Prompt:
    return Prompt(prompt_id=answer, text="", token_ids=(1,), answer=answer)


@pytest.fixture
def grader() -> Iterator[MathGrader]:
    grader = MathGrader("chat", seconds=1.0, workers=1)
    yield grader
    grader.close()


def test_answers_are_graded_in_their_order(grader: MathGrader) -> None:
    prompts = [prompt(r"\frac{1}{2}"), prompt("3"), prompt("3"), prompt(r"\sqrt{8}")]
    texts = [r"\boxed{0.5}", r"\boxed{4}", "3", r"\boxed{2\sqrt2}"]
    assert grader.rewards(prompts, texts, ["stop"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert grader.timeouts == 0


def test_a_stuck_worker_is_killed_counted_and_replaced(grader: MathGrader) -> None:
    """Power towers keep Python inside one integer multiplication, which no alarm interrupts."""
    started = time.perf_counter()
    texts = [r"\boxed{10^{10^{10}}}", r"\boxed{6/2}", r"\boxed{10^{10^{10}}}"]
    assert grader.rewards([prompt("3")] * 3, texts, ["stop"] * 3) == [0.0, 1.0, 0.0]
    assert grader.timeouts == 2  # both siblings that said so, though it was tried once
    assert time.perf_counter() - started < 30
    assert grader.rewards([prompt("3")], [r"\boxed{9/3}"], ["stop"]) == [1.0]


def test_a_worker_that_dies_costs_one_completion_and_is_counted() -> None:
    """The comparison replaces its own process by one that ends at once."""
    end_at_once = shutil.which("false")
    assert end_at_once is not None
    grader = MathGrader("chat", seconds=10.0, workers=1, equal=os.execl)
    try:
        assert grader.rewards([prompt(end_at_once)], [r"\boxed{1}"], ["stop"]) == [0.0]
        assert grader.timeouts == 1
    finally:
        grader.close()


def test_truncated_completions_start_no_worker(grader: MathGrader) -> None:
    assert grader.rewards([prompt("3")] * 2, [r"\boxed{3}", r"\boxed{6/2}"], ["length"] * 2) == [0.0, 0.0]
    assert grader._pool is None


def test_equal_text_starts_no_worker(grader: MathGrader) -> None:
    assert grader.rewards([prompt("x+1")], [r"\boxed{x + 1}"], ["stop"]) == [1.0]
    assert grader._pool is None


def test_closing_twice_is_harmless_and_grading_goes_on_after(grader: MathGrader) -> None:
    grader.close()
    grader.close()
    assert grader.rewards([prompt("3")], [r"\boxed{6/2}"], ["stop"]) == [1.0]
