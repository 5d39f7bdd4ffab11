"""Tasks that are classes of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import PythonTask
from betterhalf.errors import ConfigError, RewardError
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.screening import BadRowRule, PromptLimits, screen

LIMITS = PromptLimits(context_length=64, max_tokens=8, vocab_size=300)
REFUSE = BadRowRule(action="refuse", key="task.bad_rows")

TASKS = """
from betterhalf.types import Prompt

class Sums:
    def __init__(self, settings, tokenizer):
        self.largest = settings.get("largest", 3)
        self.tokenizer = tokenizer
        self.closed = False
    def __len__(self):
        return self.largest
    def prompt(self, index):
        return {"problem": f"{index}+1=", "answer": index + 1, "level": "easy"}
    def rewards(self, prompts, texts, finish_reasons):
        return [float(text == prompt.answer) for prompt, text in zip(prompts, texts)]
    def close(self):
        self.closed = True

class Texts(Sums):
    def prompt(self, index):
        return "abc"[index]

class Ready(Sums):
    def prompt(self, index):
        return Prompt(prompt_id=f"mine/{index}", text="shown", token_ids=(7, index), answer="9", metadata={"k": index})

class Silent:
    def __init__(self, settings, tokenizer): pass
    def __len__(self): return 2
    def prompt(self, index): return "x"

class Misspelt:
    def __init__(self, settings, tokenizer): pass
    def __len__(self): return 2
    def promt(self, index): return "x"

class NoSettings:
    def __init__(self): pass

class Empty(Sums):
    def __len__(self): return 0

class Fails(Sums):
    def __init__(self, settings, tokenizer): raise KeyError("depth")

class Leaves(Sums):
    def __init__(self, settings, tokenizer): raise SystemExit(0)

class Wrong(Sums):
    def prompt(self, index): return index if index else {"question": "x"}

class Raises(Sums):
    def prompt(self, index): return 1 / (index - 1)
    def rewards(self, prompts, texts, finish_reasons): return 1 / 0

def score(prompts, completions, metadata):
    return [float(row["level"] == "easy") for row in metadata]
"""


class Characters:
    """Tokenizer of one token for each character, with the token 1 before the text."""

    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True, return_attention_mask: bool = True
    ) -> Mapping[str, Any]:
        return {"input_ids": [self.encode(each, add_special_tokens=add_special_tokens) for each in text]}

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        raise AssertionError("no template")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(TASKS)
    return path


def built(file: Path, name: str, **settings: Any) -> DatasetTask:
    config = PythonTask.model_validate({"task": f"{file}:{name}", "template": "none", **settings})
    return build_task(config, Characters())


def test_a_mapping_gives_question_answer_and_metadata(file: Path) -> None:
    task = screen(built(file, "Sums", settings={"largest": 4}), LIMITS, REFUSE)
    assert len(task) == 4
    prompt = task.prompt(2)
    assert (prompt.prompt_id, prompt.text, prompt.answer) == ("Sums/2", "2+1=", "3")
    assert prompt.token_ids == (1, *map(ord, "2+1="))
    assert prompt.metadata == {"problem": "2+1=", "answer": 3, "level": "easy"}
    assert task.rewards([prompt, prompt], ["3", "4"], ["stop", "stop"]) == [1.0, 0.0]


def test_a_text_is_a_prompt(file: Path) -> None:
    task = built(file, "Texts")
    assert [task.prompt(index).text for index in range(3)] == ["a", "b", "c"]
    assert task.prompt(0).answer == ""


def test_a_ready_prompt_keeps_its_tokens(file: Path) -> None:
    task = screen(built(file, "Ready"), LIMITS, REFUSE)
    prompt = task.prompt(1)
    assert (prompt.prompt_id, prompt.text, prompt.token_ids) == ("mine/1", "shown", (7, 1))
    assert (prompt.answer, prompt.metadata) == ("9", {"k": 1})
    assert built(file, "Ready").prompt(1) == prompt  # unscreened


def test_a_class_may_leave_its_rewards_to_functions(file: Path) -> None:
    task = built(file, "Silent", reward=f"{file}:score", workers=1)
    try:
        prompts = [task.prompt(0)]
        assert task.rewards(prompts, ["x"], ["stop"]) == [0.0]
        (note,) = task.take_notes()
        assert "KeyError: 'level'" in note
    finally:
        task.close()


def test_the_record_changes_with_the_file_and_with_the_rows(file: Path) -> None:
    before = built(file, "Sums").record()
    assert built(file, "Sums").record() == before
    assert built(file, "Sums", settings={"largest": 2}).record().rows == 2
    file.write_text(TASKS + "\n# changed\n")
    changes = built(file, "Sums").record().reward_changes(before)
    assert len(changes) == 1 and changes[0].startswith(f"task {file}:Sums: ")


def test_closing_the_task_closes_the_object(file: Path) -> None:
    task = built(file, "Sums")
    task.close()
    assert task.grader.task.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Sum", "has no attribute 'Sum'. Did you mean Sums?"),
        ("Silent", "has no method rewards. Expected: def rewards(self, prompts, texts, finish_reasons): return"),
        ("Misspelt", "has no method prompt. Its method promt looks similar."),
        ("NoSettings", "Expected: class Mine: def __init__(self, settings, tokenizer)"),
        ("Empty", "has 0 prompts"),
        ("Fails", "with settings {} fails with KeyError: 'depth'"),
        ("Leaves", "with settings {} fails with SystemExit: 0"),
    ],
)
def test_a_class_that_cannot_be_a_task_is_refused(file: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(file, name)
    assert words in str(caught.value)
    assert "task.task=" in str(caught.value)


def test_rewards_named_twice_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="has the method rewards, and the configuration names rewards too"):
        built(file, "Sums", reward=f"{file}:score")


def test_prompts_of_the_wrong_type_are_bad_rows(file: Path) -> None:
    task = built(file, "Wrong")
    reasons = [defect.reason for index in range(2) if (defect := task.problems.row(index).defect)]
    assert reasons == ["the field `problem` is missing (the row has 'question')", "it is of the type int"]
    defect = built(file, "Raises").problems.row(1).defect
    assert defect is not None and defect.reason == "prompt(1) raises ZeroDivisionError: division by zero"


def test_rewards_that_raise_are_an_error_that_names_the_method(file: Path) -> None:
    with pytest.raises(RewardError, match=r"Raises.rewards raises ZeroDivisionError: .*task.reward"):
        built(file, "Raises").rewards([], [], [])


def test_rows_of_a_file_carry_all_fields_and_name_bad_ones(tmp_path: Path, file: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"problem": "1+1=", "answer": 2, "tests": ["a"]}), "", '{"problem": ""}', "[1]", "{"]
    rows.write_text("\n".join(lines))
    config = PythonTask(path=str(rows), template="none", answer_field="answer", reward=f"{file}:score")
    task = build_task(config, Characters())
    assert len(task) == 4
    assert task.prompt(0).metadata == {"problem": "1+1=", "answer": 2, "tests": ["a"]}
    assert task.prompt(0).answer == "2"
    defects = [task.problems.row(index).defect for index in (1, 2, 3)]
    assert [defect.place.rpartition(", ")[2] for defect in defects if defect] == ["row 3", "row 4", "row 5"]
    digest = task.record().row(0)
    rows.write_text("\n".join([lines[0].replace('"a"', '"b"'), *lines[1:]]))
    assert build_task(config, Characters()).record().row(0) != digest  # metadata counts
    task.close()
