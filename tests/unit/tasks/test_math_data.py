"""Loading rows of problems; unreadable rows are refused with their row numbers."""

from __future__ import annotations

import json
import math
import re
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from betterhalf.config.schema import MathTask
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.tasks import math as math_module
from betterhalf.tasks.build import build_task
from betterhalf.tasks.data_problems import build_problems
from betterhalf.tasks.math import INSTRUCTION
from betterhalf.tasks.row import Row
from betterhalf.tasks.templates import render


class PlainTokenizer:
    """Bytes as ids; 1 in front as a special token."""

    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        return f"<{conversation[0]['content']}>"


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    return str(file)


def load_rows(path: str, split: str) -> list[Row]:
    config = MathTask(path=path, split=split, template="none")
    return build_problems(config, PlainTokenizer(), digest_fields=False).rows


def texts(rows: list[Row]) -> list[tuple[str, str]]:
    """Question and answer of each row."""
    return [(row.question, row.answer) for row in rows]


def defect_of(row: Row) -> str:
    """The reason why a row cannot be read."""
    assert row.defect is not None
    return f"{row.defect.place}: {row.defect.reason}; {row.defect.fix}"


def test_rows_keep_their_order_and_numbers_become_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"problem": "1+1?", "answer": 2, "level": 1}\n\n{"answer": "\\\\frac12", "problem": "p"}\n')
    assert texts(load_rows(path, "train")) == [("1+1?", "2"), ("p", "\\frac12")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "row 3: it is not JSON"),
        ('["problem", "answer"]', "row 3: it is a list"),
        ('{"problem": "p"}', "row 3: the field `answer` is missing .the row has 'problem'."),
        ('{"answer": "1"}', "row 3: the field `problem` is missing"),
        ('{"problem": "p", "answer": null}', "row 3: the field `answer` holds no text"),
        ('{"problem": " ", "answer": "1"}', "row 3: the field `problem` holds no text"),
        ('{"problem": "p", "answer": true}', "row 3: the field `answer` holds no text"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, bad: str, message: str) -> None:
    path = write(tmp_path, f'{{"problem": "p", "answer": "1"}}\n\n{bad}\n')
    first, second = load_rows(path, "train")
    assert first.defect is None and re.search(message, defect_of(second))


def test_bytes_that_are_not_utf_8_affect_their_row_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"problem": "caf\xe9", "answer": "1"}\n{"problem": "p", "answer": "1"}\n')
    first, second = load_rows(str(file), "train")
    assert first.defect is not None and "it is not UTF-8" in first.defect.reason and second.defect is None


@pytest.mark.parametrize(
    ("number", "digits"),
    [
        ("1e22", "10000000000000000000000"),
        ("0.00001", "0.00001"),
        ("1E-7", "0.0000001"),
        ("2.50", "2.50"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ],
)
def test_a_number_keeps_the_digits_it_is_written_with(tmp_path: Path, number: str, digits: str) -> None:
    path = write(tmp_path, f'{{"problem": 7, "answer": {number}, "score": NaN}}')
    assert texts(load_rows(path, "train")) == [("7", digits)]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999999999", "9" * 5000])
@pytest.mark.parametrize("field", ["problem", "answer"])
def test_a_number_that_no_answer_equals_is_refused(tmp_path: Path, number: str, field: str) -> None:
    row = {"problem": '"p"', "answer": '"1"'} | {field: number}
    path = write(tmp_path, f'{{"problem": {row["problem"]}, "answer": {row["answer"]}}}')
    assert re.search(rf"row 1: the field `{field}` is .*; give a finite number", defect_of(load_rows(path, "train")[0]))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"problem": "p", "answer": "1"}\n')
    assert texts(load_rows(path, "train")) == [("p", "1")]


@pytest.mark.parametrize("mark, codec", [("\ufeff", "utf-16-le"), ("\ufeff", "utf-16-be"), ("", "utf-32")])
def test_a_file_in_another_encoding_is_one_error(tmp_path: Path, mark: str, codec: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes((mark + '{"problem": "p", "answer": "1"}\n' * 3).encode(codec))
    with pytest.raises(InputError, match=rf"rows.jsonl is in {codec[:6].upper()}; save it as UTF-8$"):
        load_rows(str(file), "train")


def test_all_that_grades_counts_in_the_digest_of_the_reward() -> None:
    grading = {file.stem for file in Path(math_module.__file__).parent.glob("math_*.py")}
    assert grading == set(math_module._REWARD_MODULES)


def test_numbers_of_a_hub_row_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"problem": "p", "answer": answer} for answer in (1e22, 1e-05, 5.0, Decimal("1E+3"))]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    answers = [row.answer for row in load_rows("org/name", "test")]
    assert answers == ["10000000000000000000000", "0.00001", "5.0", "1000"]
    for bad in (math.nan, math.inf, 10**5000):
        rows.append({"problem": "p", "answer": bad})
        assert "row 5: the field `answer` is" in defect_of(load_rows("org/name", "test")[4])
        rows.pop()


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="is empty"):
        load_rows(write(tmp_path, text), "train")


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "org/missing.json"])
def test_a_missing_file_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(InputError, match="there is no data file"):
        load_rows(path, "train")


def test_a_hub_name_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"betterhalf\[hub\]"):
        load_rows("org/name", "train")


def test_a_hub_name_or_folder_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load_dataset(path: str, split: str) -> list[dict[str, str]]:
        return [{"problem": path, "answer": split}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts(load_rows("org/name", "test")) == [("org/name", "test")]
    assert texts(load_rows(str(tmp_path), "test")) == [(str(tmp_path), "test")]


def test_a_data_set_that_cannot_be_loaded_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, split: str) -> None:
        raise ValueError("Unknown split\nlong trace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"split 'tset', cannot be loaded \(Unknown split\)"):
        load_rows("org/name", "tset")


R1 = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>1+1 {x}? Please reason step by step, and put "
    "your final answer within \\boxed{}.<\uff5cAssistant\uff5c><think>\n"
)
QWEN = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n1+1 {x}?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(("template", "text"), [("r1_distill", R1), ("qwen_math", QWEN)])
def test_templates_equal_the_ones_written_by_hand(template: str, text: str) -> None:
    assert render(template, "1+1 {x}?", INSTRUCTION) == text


@pytest.mark.parametrize(
    ("template", "text", "special"),
    [("none", "1+1 {x}?", True), ("chat", f"<1+1 {{x}}? {INSTRUCTION}>", False), ("r1_distill", R1, False)],
)
def test_each_template_makes_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: Any, text: str, special: bool
) -> None:
    monkeypatch.setattr(PlainTokenizer, "chat_template", "yes")
    path = write(tmp_path, json.dumps({"problem": "1+1 {x}?", "answer": "2"}))
    task = build_task(MathTask(path=path, template=template), PlainTokenizer())
    prompt = task.prompt(0)
    assert (prompt.text, prompt.answer, prompt.prompt_id) == (text, "2", "math/0")
    assert prompt.token_ids == (1,) * special + tuple(text.encode())


def test_a_chat_template_that_is_missing_is_found_when_the_task_is_built(tmp_path: Path) -> None:
    path = write(tmp_path, '{"problem": "p", "answer": "1"}')
    with pytest.raises(InputError, match="no chat template"):
        build_task(MathTask(path=path), PlainTokenizer())
