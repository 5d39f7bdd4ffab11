"""Running sums and word problems: hand-written prompts, solutions and rewards."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betterhalf.config.schema import ArithmeticTask
from betterhalf.errors import InputError
from betterhalf.tasks.arithmetic import (
    ITEMS,
    NAMES,
    STORIES,
    last_number,
    running_sum_digits,
    running_sum_question,
    running_sum_solution,
    solves_running_sum,
    solves_word_problem,
    word_problem,
)
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask


class FakeTokenizer:
    """One id for each character, and 0 in front as a special token."""

    def __init__(self, chat_template: str | None = "yes") -> None:
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(character) for character in text]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        assert not tokenize and add_generation_prompt
        return "".join(f"[{message['role']}]{message['content']}" for message in conversation) + "[assistant]"


def task_of(**settings: Any) -> DatasetTask:
    task = build_task(ArithmeticTask(**settings), FakeTokenizer())
    assert isinstance(task, DatasetTask)
    return task


DIGITS = (2, 7, 9, 1, 5, 5, 4, 9)
SOLUTION = "7=09,9=18,1=19,5=24,5=29,4=33,9=42."


def test_question_and_solution_equal_the_ones_written_by_hand() -> None:
    assert running_sum_question(DIGITS) == "2+7+9+1+5+5+4+9="
    assert running_sum_solution(DIGITS) == SOLUTION


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (SOLUTION, True),
        (SOLUTION[:-1], False),  # no end mark
        (SOLUTION.replace("42", "43"), False),
        ("7=09,9=18,1=19,5=24,5=29,4=32,9=42.", True),  # a corrected slip: only the total counts
        ("7=09,9=18.", False),
        ("9=042.", True),
        ("42.", False),  # no step at all
        (SOLUTION + "9=43.", False),
        ("", False),
        (".", False),
        ("=" + "9" * 5000 + ".", False),  # more digits than int() accepts
    ],
)
def test_a_running_sum_is_right_when_its_last_total_is(text: str, right: bool) -> None:
    assert solves_running_sum(text, "42") is right


@given(st.lists(st.integers(1, 9), min_size=2, max_size=16).map(tuple))
def test_every_written_solution_is_right_and_has_its_length(digits: tuple[int, ...]) -> None:
    solution = running_sum_solution(digits)
    assert solves_running_sum(solution, str(sum(digits)))
    assert not solves_running_sum(solution, str(sum(digits) + 1))
    if sum(digits) < 100:
        assert len(solution) == 5 * (len(digits) - 1)


def test_a_truncated_completion_scores_zero_whatever_it_says() -> None:
    task = task_of()
    prompt = task.prompt(3)
    right = running_sum_solution(running_sum_digits(0, 3, 8))
    assert task.rewards([prompt] * 3, [right, right, right[:-3]], ["stop", "length", "stop"]) == [1.0, 0.0, 0.0]
    assert task.timeouts == 0


def test_a_prompt_depends_on_seed_and_index_alone() -> None:
    assert task_of(num_prompts=10).prompt(4) == task_of(num_prompts=4096).prompt(4)
    texts = {task_of(seed=seed).prompt(index).text for seed in range(3) for index in range(100)}
    assert len(texts) == 300
    assert task_of().prompt(0).text == "5+1+9+6+9+8+1+7="
    assert task_of().prompt(0).answer == "46"


def test_terms_sets_the_number_of_digits() -> None:
    assert re.fullmatch(r"([1-9]\+){2}[1-9]=", task_of(terms=3).prompt(0).text)


def test_running_sums_keep_special_tokens_and_chat_prompts_add_none() -> None:
    assert task_of().prompt(0).token_ids[0] == 0
    prompt = task_of(style="word_problem").prompt(0)
    assert prompt.text.startswith("[user]") and prompt.text.endswith("[assistant]")
    assert 0 not in prompt.token_ids


def test_one_shuffle_of_the_stream_gives_every_prompt_once() -> None:
    task = task_of(num_prompts=30)
    names = [prompt.prompt_id for prompt in task.prompts(30, 30, seed=5)]
    assert sorted(names) == sorted(task.prompt(index).prompt_id for index in range(30))
    assert names != [prompt.prompt_id for prompt in task.prompts(30, 30, seed=6)]


def test_a_word_problem_without_chat_template_names_the_fix() -> None:
    with pytest.raises(InputError, match="instruction-tuned"):
        build_task(ArithmeticTask(style="word_problem"), FakeTokenizer(chat_template=None))


@pytest.mark.parametrize(
    ("story", "numbers", "answer"),
    [(0, (5, 3), 8), (1, (20, 19), 1), (2, (7, 8), 56), (3, (10, 2, 10), 2), (4, (3, 4, 10), 2)],
)
def test_stories_have_the_answer_worked_out_by_hand(story: int, numbers: tuple[int, ...], answer: int) -> None:
    assert STORIES[story].answer(*numbers) == answer


def test_every_story_occurs_and_no_answer_is_negative() -> None:
    problems = [word_problem(0, index) for index in range(400)]
    assert all(answer >= 0 for _, answer in problems)
    masked = {re.sub(r"\d+|" + "|".join(NAMES), "#", text) for text, _ in problems}
    assert len(masked) == len(STORIES) * len(ITEMS) == 40


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12.", 12),
        ("5 + 3 = 8 apples", 8),
        ("It is 1,234.", 1234),
        ("either 3, 4", 4),
        ("x = -3", -3),
        ("5-3", 3),
        ("10 - 12.", 12),
        ("$12.50", 12.5),
        ("**56**", 56),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_a_word_problem_is_right_when_its_last_number_is() -> None:
    assert solves_word_problem("7 times 8 is 56. So there are 56.0 cookies.", "56")
    assert not solves_word_problem("56? No: 57", "56")
    assert not solves_word_problem("many", "56")
