"""Rows of any data set: Parquet, nested fields, chat messages, filters; the digest covers what rewards may read."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from betterhalf.config.schema import DataConfig, MathTask
from betterhalf.errors import ConfigError, InputError, MissingExtraError
from betterhalf.tasks.build import build_task
from betterhalf.tasks.data_fields import lookup, plain_fields
from betterhalf.tasks.data_problems import DataProblems, build_problems
from betterhalf.tasks.data_source import read_rows
from betterhalf.tasks.fingerprint import row_digest
from betterhalf.tasks.math import INSTRUCTION
from betterhalf.tasks.screening import BadRowRule, PromptLimits, screen

VERL_ROW = {
    "data_source": "math",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 7, "answer": "two"},
}
"""The columns of verl's data files."""


class Characters:
    """One token for each character; its template shows messages and arguments."""

    chat_template: Any = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}{{ add_generation_prompt }}"
    )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % 100 for character in text]

    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(one) for one in text]}

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> str:
        turns = "".join(f"[{message['role']}] {message['content']} " for message in conversation)
        return turns + "".join(f"{name}={value}" for name, value in more.items())


def jsonl(folder: Path, *rows: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def parquet(folder: Path, *rows: Any) -> str:
    file = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return str(file)


def problems(path: str, *, digest_fields: bool = True, **settings: Any) -> DataProblems:
    config = DataConfig(type="any", path=path, **settings)
    return build_problems(config, Characters(), digest_fields=digest_fields)


def reason(built: DataProblems, index: int) -> str:
    defect = built.row(index).defect
    assert defect is not None
    return f"{defect.place}: {defect.reason}; {defect.fix}"


# -- sources


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_row_of_verl_is_read_by_its_dotted_names(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path, VERL_ROW, VERL_ROW)
    built = problems(path, question_field="prompt", answer_field="reward_model.ground_truth")
    row = built.row(1)
    assert (row.question, row.answer, row.place) == ("1+1?", "2", f"{path}, row 2")
    assert row.metadata == VERL_ROW and row.messages == tuple(VERL_ROW["prompt"])
    assert built.draft(1).text == "[system] Be brief. [user] 1+1? "


def test_the_papers_set_by_name_gives_the_prompts_of_its_file(tmp_path: Path) -> None:
    """On the hub it has verl's columns, and its questions already end with the instruction."""
    problem = {"problem": "What is $2\\cdot 3$?", "answer": "6"}
    asked = [{"role": "user", "content": f"{problem['problem']} {INSTRUCTION}"}]
    by_name = parquet(tmp_path, {"prompt": asked, "reward_model": {"ground_truth": "6"}})
    columns = {"question_field": "prompt", "answer_field": "reward_model.ground_truth", "instruction": ""}
    tasks = [
        MathTask(path=jsonl(tmp_path, problem), template="r1_distill"),
        MathTask(path=by_name, template="r1_distill", **columns),
    ]
    one, other = (build_task(task, Characters()).prompt(0) for task in tasks)
    assert one.text == other.text and one.answer == other.answer == "6"


def test_parquet_values_become_json(tmp_path: Path) -> None:
    values = {
        "problem": "p",
        "answer": Decimal("1000.50"),
        "day": datetime.date(2026, 1, 2),
        "raw": b"\x00\xff",
        "n": [1, 2.5],
    }
    row = problems(parquet(tmp_path, values)).row(0)
    assert row.answer == "1000.50"
    assert row.metadata == {"problem": "p", "answer": "1000.50", "day": "2026-01-02", "raw": "AP8=", "n": [1, 2.5]}


def test_numbers_of_a_json_row_are_numbers_in_its_metadata(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "p", "answer": 2.50, "level": 3, "big": ' + "9" * 5000 + ', "in": [{"x": -1e2}]}\n')
    row = problems(str(file)).row(0)
    assert row.answer == "2.50"
    assert row.metadata == {"problem": "p", "answer": 2.5, "level": 3, "big": "9" * 5000, "in": [{"x": -100.0}]}


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("text")
    with pytest.raises(InputError, match=r"rows.parquet cannot be read as Parquet"):
        problems(str(tmp_path / "rows.parquet"))


def test_a_missing_parquet_file_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(InputError, match="there is no data file 'org/rows.parquet'"):
        problems("org/rows.parquet")


def test_a_folder_without_the_package_that_reads_it_is_called_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="is a folder, and folders need the package datasets.*JSONL or Parquet"):
        problems(str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"'org/name' is not a local file, and the hub needs the package"):
        problems("org/name")


def test_the_first_rows_are_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"problem": str(i), "answer": i} for i in range(5)))
    assert [row.question for row in problems(path, max_rows=2).rows] == ["0", "1"]


def test_a_subset_of_a_hub_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, split: str) -> list[dict[str, Any]]:
        return [{"problem": "/".join(names), "answer": split}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_rows("org/name", "test", "main")[0].fields == {"problem": "org/name/main", "answer": "test"}
    assert read_rows("org/name", "test", None)[0].fields["problem"] == "org/name"


def test_without_network_the_message_says_how_to_pass_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class TransportError(Exception):
        """Not an OSError, like the errors of the hub's client."""

    def load_dataset(*_: str, split: str) -> None:
        raise TransportError("Name or service not known\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError) as caught:
        problems("org/name")
    message = str(caught.value)
    assert "(Name or service not known)" in message and "`hf download org/name --repo-type dataset" in message
    assert "task.path to its Parquet or JSONL file" in message


# -- fields


@pytest.mark.parametrize(
    ("name", "value"),
    [("a", {"b": [{"c": 1}]}), ("a.b.0.c", 1), ("a.b.1.c", None), ("a.x.c", None), ("d.e", 2), ("d", None)],
)
def test_dots_lead_into_nested_fields_unless_a_field_has_that_name(name: str, value: Any) -> None:
    assert lookup({"a": {"b": [{"c": 1}]}, "d.e": 2}, name) == value


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": "q", "answer": "1"}, {}, "row 1: the field `problem` is missing (the row has 'question', "
         "'answer'); set task.question_field=question, or give each row the field `problem`"),
        ({"problem": "q", "solution": "1"}, {}, "set task.answer_field=solution"),
        ({"problem": "q", "x": {"answer": "1"}}, {"answer_field": "x.anwser"}, "set task.answer_field=x.answer"),
        ({"problem": "q", "answer": None}, {}, "the field `answer` holds no text"),
        ({"problem": [{"role": "user"}], "answer": "1"}, {}, "message 1 of its question has no text for `role` and"),
        ({"problem": [], "answer": "1"}, {}, "the last message of its question is not a text from the user"),
        ({"problem": [{"role": "assistant", "content": "a"}], "answer": "1"}, {}, "is not a text from the user"),
    ],
)  # fmt: skip
def test_a_row_without_its_field_names_row_and_nearest_field(
    row: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in reason(problems(jsonl(tmp_path, row), **settings), 0)


def test_data_without_answers_is_read_if_asked_for(tmp_path: Path) -> None:
    built = problems(jsonl(tmp_path, {"problem": "q"}), answer_field=None)
    assert (built.row(0).answer, built.row(0).defect) == ("", None)


def test_the_order_of_a_set_does_not_change_its_json() -> None:
    assert plain_fields({"s": {"b", "a", "c"}, "t": (1, 2)}) == {"s": ["a", "b", "c"], "t": [1, 2]}


# -- digests


def by_hand(*texts: str) -> bytes:
    found = hashlib.blake2b(digest_size=8)
    for text in texts:
        found.update(len(text.encode()).to_bytes(8, "big") + text.encode())
    return found.digest()


def test_a_row_of_the_math_task_has_the_digest_of_earlier_versions(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"problem": "1+1?", "answer": 2, "level": 5})
    task = build_task(MathTask(path=path, template="none"), Characters())
    assert task.record().row_digests == by_hand("1+1?", "2")
    assert task.prompt(0).metadata == {"problem": "1+1?", "answer": 2, "level": 5}


def test_the_digest_covers_all_fields_where_rewards_see_them(tmp_path: Path) -> None:
    rows = [{"problem": "q", "answer": "1", "level": level} for level in (1, 2)]
    one, two = problems(jsonl(tmp_path, *rows)).rows
    assert row_digest(one) == by_hand("q", "1", '{"fields": {"answer": "1", "level": 1, "problem": "q"}}')
    assert row_digest(one) != row_digest(two)


def test_earlier_messages_count_in_the_digest_of_the_math_task(tmp_path: Path) -> None:
    rows = [
        {"problem": [{"role": "system", "content": text}, {"role": "user", "content": "q"}], "answer": "1"}
        for text in "ab"
    ]
    one, two = problems(jsonl(tmp_path, *rows), digest_fields=False).rows
    assert row_digest(one) != row_digest(two) and one.question == two.question


# -- filters

LIMITS = PromptLimits(context_length=1000, max_tokens=10, vocab_size=200)
REFUSE = BadRowRule(action="refuse", key="task.bad_rows")


@pytest.fixture
def filters(tmp_path: Path) -> str:
    file = tmp_path / "keep.py"
    file.write_text(
        "def easy(row): return row['level'] < 3\n"
        "def number(row): return row['level']\n"
        "def nothing(): return True\n"
        "def none(row): return False\n"
        "def leave(row): raise SystemExit(0)\n"
    )
    return str(file)


def levels(folder: Path, *values: Any) -> str:
    return jsonl(folder, *({"problem": f"{i}+1=", "answer": i + 1, "level": level} for i, level in enumerate(values)))


def screened(path: str, limits: PromptLimits = LIMITS, count: int | None = None, **settings: Any) -> Any:
    task = build_task(MathTask(path=path, template="none", **settings), Characters())
    try:
        return screen(task, limits, REFUSE, count=count, will_grade=False)
    finally:
        task.close()


def test_rows_that_the_filter_does_not_keep_are_left_out_and_counted(filters: str, tmp_path: Path) -> None:
    path = levels(tmp_path, 1, 3, 2, 5, 1)
    limits = PromptLimits(context_length=1000, max_tokens=10, vocab_size=200, filters=True)
    kept = screened(path, limits, filter=f"{filters}:easy")
    assert [kept.prompt(i).prompt_id for i in range(len(kept))] == ["math/0", "math/2", "math/4"]
    assert [(bad.place, bad.filtered) for bad in kept.left_out] == [(f"{path}, row {n}", True) for n in (2, 4)]
    assert len(screened(path, limits, count=2, filter=f"{filters}:easy")) == 2


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("easy", (1, None), "row 2: the filter .*easy raises TypeError: "),
        ("leave", (1, 2), "row 1: the filter .*leave raises SystemExit: 0"),
        ("number", (1, 2), r"row 1: the filter .*number returns '1' \(int\), not true or false"),
        ("none", (1, 2), "the filters leave out all 2 rows"),
    ],
)
def test_a_filter_that_fails_makes_a_bad_row(name: str, values: Any, words: str, filters: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        screened(levels(tmp_path, *values), filter=f"{filters}:{name}")


@pytest.mark.parametrize(
    ("name", "words"), [("esy", "Did you mean easy?"), ("nothing", r"Expected: def keep\(row: dict\) -> bool")]
)
def test_a_filter_that_cannot_be_called_is_refused(name: str, words: str, filters: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        problems(levels(tmp_path, 1), filter=f"{filters}:{name}")


def test_longer_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"problem": "1" * size, "answer": "1"} for size in (4, 9, 5, 6)))
    limits = PromptLimits(context_length=1000, max_tokens=10, vocab_size=200, max_prompt_tokens=5, filters=True)
    kept = screened(path, limits, max_prompt_tokens=5)
    assert [len(kept.prompt(i).token_ids) for i in range(len(kept))] == [4, 5]
    assert [bad.reason for bad in kept.left_out] == [
        f"its prompt of {size} tokens is longer than task.max_prompt_tokens=5" for size in (9, 6)
    ]
