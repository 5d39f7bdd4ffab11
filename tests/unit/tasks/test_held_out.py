"""Rows held out: the same in every run, never trained on, with all rows of one question on one side."""

from __future__ import annotations

from typing import Any

import pytest

from betterhalf.config.schema import ArithmeticTask
from betterhalf.errors import InputError
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.held_out import held_out_count, held_out_rows
from betterhalf.tasks.row import Row


class Questions:
    """Rows with these questions."""

    tokenizer: Any = None

    def __init__(self, *questions: str) -> None:
        self.questions = questions

    def __len__(self) -> int:
        return len(self.questions)

    def row(self, index: int) -> Row:
        return Row(prompt_id=str(index), place=f"row {index + 1}", question=self.questions[index], answer="1")

    def draft(self, index: int) -> Any:
        raise AssertionError("a split needs no prompts")


class Characters:
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


def part(name: str, **settings: Any) -> DatasetTask:
    config = ArithmeticTask(num_prompts=200, terms=8, part=name, **{"held_out": 50, **settings})  # type: ignore[arg-type]
    tokenizer: Any = Characters()
    return build_task(config, tokenizer)


def ids(task: DatasetTask) -> list[str]:
    return [task.prompt(index).prompt_id for index in range(len(task))]


def test_the_parts_share_no_question_and_make_up_the_whole() -> None:
    train, held_out, everything = part("train"), part("held_out"), part("all")
    assert (len(train), len(held_out), len(everything)) == (150, 50, 200)
    assert sorted(ids(train) + ids(held_out)) == sorted(ids(everything))
    texts = [{task.prompt(i).text for i in range(len(task))} for task in (train, held_out)]
    assert not texts[0] & texts[1]
    assert ids(train) == sorted(ids(train), key=lambda name: int(name.split("/")[1]))


def test_a_share_equals_its_number_of_rows_and_the_seed_chooses_others() -> None:
    assert ids(part("held_out", held_out=0.25)) == ids(part("held_out"))
    other = ids(part("held_out", held_out_seed=1))
    assert len(other) == 50 and other != ids(part("held_out"))


def test_the_choice_depends_on_the_questions_alone() -> None:
    questions = [f"q{i}" for i in range(20)]
    chosen = {questions[i] for i in held_out_rows(Questions(*questions), 5, 0)}
    turned = questions[::-1]
    assert {turned[i] for i in held_out_rows(Questions(*turned), 5, 0)} == chosen


def test_rows_with_one_question_stay_together() -> None:
    rows = Questions(*"abcabcabc")
    held_out = held_out_rows(rows, 1, 0)
    assert len(held_out) == 3 and len({rows.questions[i] for i in held_out}) == 1


@pytest.mark.parametrize(("held_out", "rows", "count"), [(0.1, 50, 5), (0.001, 50, 1), (7, 50, 7), (0.5, 3, 2)])
def test_the_number_of_rows_held_out(held_out: float, rows: int, count: int) -> None:
    assert held_out_count(held_out, rows) == count


@pytest.mark.parametrize("held_out", [3, 9, 0.99])
def test_something_must_be_left_to_train_on(held_out: float) -> None:
    with pytest.raises(InputError, match=r"leaves none of 3 rows \(3 different questions\) to train on"):
        held_out_rows(Questions("a", "b", "c"), held_out, 0)


def test_without_rows_held_out_nothing_changes() -> None:
    assert ids(part("train", held_out=0)) == ids(part("all", held_out=0)) == [f"running_sum/{i}" for i in range(200)]
