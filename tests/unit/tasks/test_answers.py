"""Answers that count as votes: equal answers are equal strings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from betterhalf.config.schema import ArithmeticTask, MathTask, PerfectibleTask, ReasoningGymTask
from betterhalf.errors import RewardError
from betterhalf.tasks.answers import answer_extractor, math_answer, running_sum_answer, word_problem_answer
from betterhalf.tasks.arithmetic import solves_running_sum, solves_word_problem


class WithTemplate:
    chat_template = "x"


class WithoutTemplate:
    chat_template = None


@pytest.mark.parametrize(
    ("text", "answer"), [("7=09,9=18.", "18"), ("9=018. ", "18"), ("7=09,9=18", None), ("", None), ("=1.=2", None)]
)
def test_the_answer_of_a_running_sum_is_its_last_total(text: str, answer: str | None) -> None:
    assert running_sum_answer(text) == answer
    assert solves_running_sum(text, "18") == (answer == "18")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("She has 1,200 nuts.", "1200"), ("3 + 4 = 7", "7"), ("It is 7.0", "7"), ("-3 left", "-3"), ("none", None)],
)
def test_the_answer_of_a_word_problem_is_its_last_number(text: str, answer: str | None) -> None:
    assert word_problem_answer(text) == answer
    assert answer is None or solves_word_problem(text, answer)


def test_math_answers_that_look_alike_are_one_vote() -> None:
    for alike in (
        (r"\boxed{\frac{1}{2}}", r"\boxed{ \dfrac{1}{2} }", r"\boxed{$\frac{1}{2}$}"),
        (r"\boxed{10\,000}", r"\boxed{10{,}000}", r"\boxed{10000}"),
        (r"\boxed{\left(1, 2\right)}", r"\boxed{(1,2)}"),
    ):
        assert len({math_answer(text, "none") for text in alike}) == 1, alike
    assert math_answer(r"\boxed{3 1/2}", "none") != math_answer(r"\boxed{31/2}", "none")
    assert math_answer("no box", "none") is None
    assert math_answer(r"\boxed{1} no thought", "r1_distill") is None
    assert math_answer("\\boxed{" + "1" * 10**6 + "}", "none") == "1" * 10**6


def test_each_task_has_its_extractor() -> None:
    assert answer_extractor(None, ArithmeticTask(), WithTemplate()) is running_sum_answer  # type: ignore[arg-type]
    auto = ArithmeticTask(style="auto")
    assert answer_extractor(None, auto, WithTemplate()) is word_problem_answer  # type: ignore[arg-type]
    assert answer_extractor(None, auto, WithoutTemplate()) is running_sum_answer  # type: ignore[arg-type]
    perfectible = PerfectibleTask(path="x", base=MathTask(path="y", template="none"))
    extract = answer_extractor(None, perfectible, WithTemplate())  # type: ignore[arg-type]
    assert extract is not None and extract(r"\boxed{4}") == "4"


@pytest.mark.parametrize(("part", "answer"), [("tags", "4 2"), ("last_number", "7"), ("last_word", "7"), ("all", None)])
def test_the_vote_of_a_reasoning_gym_task_is_the_part_that_is_scored(part: str, answer: str | None) -> None:
    config = ReasoningGymTask.model_validate({"generator": "chain_sum", "extract": part})
    extract = answer_extractor(None, config, WithTemplate())  # type: ignore[arg-type]
    text = "<answer> 4\n  2 </answer> or 7."
    assert extract is not None
    assert extract(text) == (answer or "<answer> 4 2 </answer> or 7.") and extract("") is None


class Own:
    """Task of the user's own."""

    def answer(self, text: str) -> Any:
        return {"number": 3, "": None}.get(text, text[:1])


@pytest.mark.parametrize(
    "task",
    [
        Own(),
        SimpleNamespace(problems=SimpleNamespace(task=Own())),
        SimpleNamespace(problems=SimpleNamespace(base=SimpleNamespace(task=Own()))),
    ],
    ids=["itself", "behind problems", "behind a subset"],
)
def test_a_task_of_one_s_own_may_extract_answers(task: object) -> None:
    extract = answer_extractor(task, ArithmeticTask(), WithTemplate())  # type: ignore[arg-type]
    assert extract is not None and extract("xyz") == "x" and extract("") is None
    with pytest.raises(RewardError, match=r"Own.answer returned 3. Return the answer as text"):
        extract("number")


def test_an_error_in_the_user_s_method_is_named() -> None:
    class Raises:
        def answer(self, text: str) -> str | None:
            raise KeyError(text)

    extract = answer_extractor(Raises(), ArithmeticTask(), WithTemplate())  # type: ignore[arg-type]
    assert extract is not None
    with pytest.raises(RewardError, match="Raises.answer raises KeyError: 'x'"):
        extract("x")
