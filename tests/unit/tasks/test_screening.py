"""Every row is checked before a run: unusable rows are named by their location, refused or left out, and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import ArithmeticTask, MathTask, ModelConfig
from betterhalf.errors import InputError
from betterhalf.models.loading import load_model
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.math_grader import MathGrader
from betterhalf.tasks.screening import BadRowRule, PromptLimits, screen

LIMITS = PromptLimits(context_length=128, max_tokens=40, vocab_size=16)
REFUSE = BadRowRule(action="refuse", key="task.bad_rows")
SKIP = BadRowRule(action="skip", key="task.bad_rows")
SUM = {"problem": "2+7=", "answer": "9"}
LONG = {"problem": "1+" * 64 + "1=", "answer": "65"}


def rows_file(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model(ModelConfig(name="demo")).tokenizer


_BUILT: list[DatasetTask] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Stop the workers of every task that a test built."""
    yield
    while _BUILT:
        _BUILT.pop().close()


def task_of(path: Path, tokenizer: Any, **settings: Any) -> DatasetTask:
    _BUILT.append(build_task(MathTask(path=str(path), **{"template": "none", **settings}), tokenizer))
    return _BUILT[-1]


def test_a_bad_row_far_down_is_found_and_named_by_its_line(tmp_path: Path, tokenizer: Any) -> None:
    """Row 2,090 of 2,100, after a blank line, which counts as a line."""
    rows = [SUM] * 2089 + [LONG] + [SUM] * 10
    path = rows_file(tmp_path, "", *rows)
    with pytest.raises(InputError) as caught:
        screen(task_of(path, tokenizer), LIMITS, REFUSE)
    message = str(caught.value)
    assert f"{path}, row 2091: its prompt of 130 tokens leaves no room in the model's context of 128" in message
    assert "1 of 2100 rows" in message and "task.bad_rows=skip" in message


@pytest.mark.parametrize("rule", [REFUSE, SKIP])
def test_progress_reaches_the_last_row(rule: BadRowRule, tmp_path: Path, tokenizer: Any) -> None:
    advanced: list[int] = []
    screen(task_of(rows_file(tmp_path, *[SUM] * 1100), tokenizer), LIMITS, rule, advance=advanced.append)
    assert sum(advanced) == 1100


def test_rows_left_out_are_counted_and_the_others_keep_their_names(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[Any] = [{"problem": f"{i % 9}+1=", "answer": str(i % 9 + 1)} for i in range(30)]
    rows[3], rows[17], rows[29] = LONG, {"problem": "\ud800", "answer": "1"}, {"problem": "2+2=", "answer": "\\frac{"}
    task = task_of(rows_file(tmp_path, *rows), tokenizer)
    screened = screen(task, LIMITS, SKIP)
    assert [bad.place.rpartition(", ")[2] for bad in screened.left_out] == ["row 4", "row 18", "row 30"]
    kept = [index for index in range(30) if index not in (3, 17, 29)]
    assert [screened.prompt(i) for i in range(len(screened))] == [task.prompt(index) for index in kept]
    assert screened.prompt(16).prompt_id == "math/18" and screened.prompt(3).prompt_id == "math/4"
    screened.close()


def test_a_valid_data_set_is_unchanged(tmp_path: Path, tokenizer: Any) -> None:
    task = build_task(ArithmeticTask(num_prompts=3000), tokenizer)
    for screened in (screen(task, LIMITS, REFUSE), screen(task, LIMITS, SKIP)):
        assert screened.left_out == ()
        assert screened.prompts(2990, 40, seed=3) == task.prompts(2990, 40, seed=3)
        assert screened.record() == task.record()


@pytest.mark.parametrize(
    ("row", "reason", "fix"),
    [
        (LONG, "its prompt of 130 tokens leaves no room in the model's context of 128", "Shorten or drop it"),
        (
            {"problem": "1+" * 44 + "1=", "answer": "45"},
            "its prompt of 90 tokens and sampling.max_tokens=40 exceed the model's context of 128",
            "Set sampling.max_tokens=38 or less, choose a model with a longer context",
        ),
        (
            {"problem": "1+\ud8001=", "answer": "2"},
            "character 3 of its question is half of a surrogate pair",
            "Replace",
        ),
        ({"problem": "1+1=", "answer": "\udfff"}, "character 1 of its answer is half of a surrogate pair", "Replace"),
        ({"problem": "1+1=", "answer": "\\frac{"}, "no completion can match its answer '", "Correct the answer"),
    ],
)
def test_each_defect_is_named_with_what_to_do(
    row: dict[str, str], reason: str, fix: str, tmp_path: Path, tokenizer: Any
) -> None:
    task = task_of(rows_file(tmp_path, SUM, row), tokenizer)
    with pytest.raises(InputError) as caught:
        screen(task, LIMITS, REFUSE)
    assert f"row 2: {reason}" in str(caught.value) and fix in str(caught.value), caught.value
    assert len(screen(task, LIMITS, SKIP)) == 1
    task.close()


def test_a_longer_context_is_advised_only_where_it_would_help(tmp_path: Path, tokenizer: Any) -> None:
    unreadable = {"problem": "1+1=", "answer": "\\frac{context"}
    with pytest.raises(InputError, match="no completion can match its answer .*context") as caught:
        screen(task_of(rows_file(tmp_path, SUM, unreadable), tokenizer), LIMITS, REFUSE)
    assert "longer context" not in str(caught.value)


def test_tokens_that_the_model_does_not_have_are_a_defect(tmp_path: Path, tokenizer: Any) -> None:
    task = task_of(rows_file(tmp_path, SUM), tokenizer)
    small = PromptLimits(context_length=128, max_tokens=40, vocab_size=12)
    with pytest.raises(InputError, match=r"row 1: token 13 of its prompt is outside the model's vocabulary of 12"):
        screen(task, small, REFUSE)


def test_several_bad_rows_show_the_first_and_their_number(tmp_path: Path, tokenizer: Any) -> None:
    task = task_of(rows_file(tmp_path, *[SUM, LONG] * 10), tokenizer)
    with pytest.raises(InputError) as caught:
        screen(task, LIMITS, REFUSE)
    lines = str(caught.value).splitlines()
    assert lines[0] == "10 of 20 rows cannot be used:"
    assert [line.partition(": ")[0].rpartition(", ")[2] for line in lines[1:6]] == [
        f"row {n}" for n in (2, 4, 6, 8, 10)
    ]
    assert lines[6] == "  ... and 5 more"


def test_skipping_every_row_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    task = task_of(rows_file(tmp_path, LONG, LONG), tokenizer)
    with pytest.raises(InputError, match="2 of 2 rows cannot be used") as caught:
        screen(task, LIMITS, SKIP)
    assert "=skip" not in str(caught.value)


def test_only_the_rows_that_will_be_used_are_checked(tmp_path: Path, tokenizer: Any) -> None:
    task = task_of(rows_file(tmp_path, SUM, LONG, SUM, SUM, LONG), tokenizer)
    assert len(screen(task, LIMITS, REFUSE, count=1)) == 1
    screened = screen(task, LIMITS, SKIP, count=3)
    assert [screened.prompt(i).prompt_id for i in range(3)] == ["math/0", "math/2", "math/3"]
    assert len(screened.left_out) == 1
    with pytest.raises(InputError, match="1 of 3 rows"):
        screen(task, LIMITS, REFUSE, count=3)


# -- chat templates


def with_template(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not supported"),
        ("{{ nobody.name }}", "UndefinedError: 'nobody' is undefined"),
        ("{{ messages[0]['content'] | round }}", "TypeError: "),
        ("{% if %}", "TemplateSyntaxError: Expected an expression"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_chat_template_that_fails_is_bad_input_with_its_own_message(
    template: str, words: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = with_template(tokenizer, template, monkeypatch)
    limits = PromptLimits(context_length=1024, max_tokens=40, vocab_size=16)
    for task in (
        task_of(rows_file(tmp_path, SUM), failing, template="chat"),
        build_task(ArithmeticTask(style="word_problem", num_prompts=2), failing),
    ):
        for rule in (REFUSE, SKIP):
            with pytest.raises(InputError) as caught:
                screen(task, limits, rule)
            assert f"the chat template of the model's tokenizer fails with {words}" in str(caught.value)
            assert "orrect the template" in str(caught.value)


def test_a_template_that_refuses_one_row_leaves_the_others(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('no sevens') if '7' in messages[0]['content'] else '1+1=' }}"
    picky = with_template(tokenizer, template, monkeypatch)
    path = rows_file(tmp_path, {"problem": "1+1=", "answer": "2"}, SUM)
    screened = screen(task_of(path, picky, template="chat"), LIMITS, SKIP)
    assert len(screened) == 1 and "row 2" in screened.left_out[0].place and "no sevens" in screened.left_out[0].reason


@pytest.mark.parametrize("will_grade", [True, False])
def test_workers_start_with_the_check_where_completions_will_be_graded(
    tmp_path: Path, tokenizer: Any, will_grade: bool
) -> None:
    task = task_of(rows_file(tmp_path, SUM), tokenizer)
    assert isinstance(task.grader, MathGrader)
    assert len(screen(task, LIMITS, REFUSE, will_grade=will_grade)) == 1
    assert bool(task.grader._pool._workers) is will_grade
