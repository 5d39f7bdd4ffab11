"""Prompts: system message, instruction, arguments of the chat template; an argument that is not read is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from betterhalf.config.schema import DataConfig
from betterhalf.errors import ConfigError
from betterhalf.tasks.row import Row, RowError
from betterhalf.tasks.templates import question_template, render, template_source, template_variables

TALK = ({"role": "system", "content": "S"}, {"role": "user", "content": "q"})


class Shown:
    """Shows messages and arguments; its template reads one argument, and tests whether a second is defined."""

    chat_template: Any = (
        "{% for message in messages %}{{ message.role }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
        "{% generation %}x{% endgeneration %}{% if enable_thinking is defined and not enable_thinking %}y{% endif %}"
        "{% if not effort is defined %}{% set effort = 'low' %}{% endif %}{% set own = 1 %}{{ effort }}{{ own }}"
    )

    def apply_chat_template(self, conversation: Any, **more: Any) -> str:
        assert more.pop("tokenize") is False and more.pop("add_generation_prompt") is True
        return "|".join(f"{message['role']}:{message['content']}" for message in conversation) + str(more or "")


def draft_of(row: Row, default: str = "", **settings: Any) -> str:
    tokenizer: Any = Shown()
    config = DataConfig(type="any", path="x", **settings)
    return question_template(config, tokenizer, default).draft(tokenizer, row).text


def row_of(question: str = "q", messages: Any = ()) -> Row:
    return Row(prompt_id="0", place="row 1", question=question, answer="1", messages=messages)


@pytest.mark.parametrize(
    ("settings", "messages", "text"),
    [
        ({}, (), "user:q"),
        ({"system_prompt": "P", "instruction": "I"}, (), "system:P|user:q I"),
        ({}, TALK, "system:S|user:q"),
        ({"system_prompt": "P", "instruction": "I"}, TALK, "system:P|user:q I"),
        ({"template_arguments": {"enable_thinking": False}}, (), "user:q{'enable_thinking': False}"),
        ({"template_arguments": {"effort": "high"}}, (), "user:q{'effort': 'high'}"),
        ({"template": "none"}, (), "q"),
        ({"template": "none", "instruction": "I"}, (), "q I"),
    ],
)
def test_each_setting_has_its_place_in_the_prompt(settings: Any, messages: Any, text: str) -> None:
    assert draft_of(row_of(messages=messages), **settings) == text


def test_the_tasks_own_instruction_is_used_where_none_is_given() -> None:
    assert draft_of(row_of(), "D") == "user:q D"
    assert draft_of(row_of(), "D", instruction="") == "user:q"
    assert draft_of(row_of(), "D", template="none") == "q"


def test_templates_of_the_paper_without_an_instruction() -> None:
    assert (
        render("r1_distill", "q{}", "")
        == "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>q{}<\uff5cAssistant\uff5c><think>\n"
    )
    assert render("qwen_math", "q", "") == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_needs_a_template_with_turns() -> None:
    with pytest.raises(
        RowError, match=r"conversation of 2 messages, which task.template=none .* set task.template=chat"
    ):
        draft_of(row_of(messages=TALK), template="none")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("enable_thinkng", "is not read by the chat template .* Did you mean enable_thinking?"),
        ("own", r"It reads effort, enable_thinking\."),
        ("zzz", r"It reads effort, enable_thinking\."),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        draft_of(row_of(), template_arguments={name: False})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template_arguments": {"tokenize": True}}, "task.template_arguments.tokenize is set by the task itself"),
        ({"template": "none", "system_prompt": "P"}, "task.system_prompt has no effect with task.template=none"),
        ({"template": "qwen_math", "template_arguments": {"a": 1}}, "task.template_arguments has no effect"),
        ({"held_out": 2.5}, "task.held_out = 2.5 is not a number of rows"),
        ({"part": "held_out"}, "task.part = 'held_out' needs rows that are held out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig(type="any", path="x", **settings)


def test_a_template_in_an_unknown_dialect_offers_its_words() -> None:
    assert {"enable_thinking", "odd"} <= template_variables("{% odd %}{{ enable_thinking }}")


def test_what_shapes_the_prompt_is_recorded() -> None:
    tokenizer: Any = Shown()
    plain = DataConfig(type="any", path="x")
    other = DataConfig(type="any", path="x", system_prompt="P", template_arguments={"effort": "high"})
    assert template_source(plain, tokenizer).keys() == {"template", "template text"}
    assert template_source(other, tokenizer)["template arguments"] == "{'effort': 'high'}"
    digests = {template_source(plain, tokenizer, text)["template text"] for text in ("", "a", "b")}
    assert len(digests) == 3
