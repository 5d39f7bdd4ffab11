"""Put a question into the prompt template of a task: the tokenizer's chat template, one of the paper's, or none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from betterhalf.config.schema import PromptConfig
from betterhalf.errors import ConfigError
from betterhalf.tasks.fingerprint import text_digest
from betterhalf.tasks.prompting import (
    Draft,
    message_draft,
    plain_draft,
    require_chat_template,
    templated_draft,
)
from betterhalf.tasks.row import Message, Row, RowError
from betterhalf.tasks.task import Tokenizer

_BAR, _BLOCK = "\N{FULLWIDTH VERTICAL LINE}", "\N{LOWER ONE EIGHTH BLOCK}"

TEMPLATES = {
    "r1_distill": (
        f"<{_BAR}begin{_BLOCK}of{_BLOCK}sentence{_BAR}><{_BAR}User{_BAR}>"
        + "{problem} {instruction}"
        + f"<{_BAR}Assistant{_BAR}><think>\n"
    ),
    "qwen_math": (
        "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
"""Prompt templates with special tokens: DeepSeek-R1-Distill (with <think> already opened) and Qwen2.5-Math."""

_WITHOUT_INSTRUCTION = {
    "{problem} {instruction}": "{problem}",
    "<|im_start|>system\n{instruction}<|im_end|>\n": "",
}
"""Parts of TEMPLATES, and what they become without an instruction."""


def render(template: str, problem: str, instruction: str) -> str:
    """Render a problem in one of TEMPLATES; braces in the problem are left as they are."""
    text = TEMPLATES[template]
    for old, new in () if instruction else _WITHOUT_INSTRUCTION.items():
        text = text.replace(old, new)
    return problem.join(text.replace("{instruction}", instruction).split("{problem}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionTemplate:
    """Prompt around each question of a task."""

    name: str
    """`chat`, `r1_distill`, `qwen_math` or `none`."""
    instruction: str = ""
    """Text after each question, or the system message of `qwen_math`; empty for none."""
    system_prompt: str | None = None
    """System message, in place of the data's own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template."""

    def draft(self, tokenizer: Tokenizer, row: Row) -> Draft:
        """Return the question of a row as text for the model.

        Raises:
            RowError: the chat template fails, or a conversation meets a template without turns.
        """
        if self.name == "chat":
            messages = self._conversation(row)
            return message_draft(tokenizer, row.prompt_id, messages, answer=row.answer, arguments=self.arguments)
        if len(row.messages) > 1:
            raise RowError(
                f"its question is a conversation of {len(row.messages)} messages, which task.template={self.name} "
                "cannot hold",
                "set task.template=chat",
            )
        if self.name == "none":
            return plain_draft(row.prompt_id, self._instructed(row.question), answer=row.answer)
        text = render(self.name, row.question, self.instruction)
        return templated_draft(row.prompt_id, text, answer=row.answer)

    def _conversation(self, row: Row) -> list[Message]:
        *before, last = row.messages or ({"role": "user", "content": row.question},)
        if self.system_prompt is not None:
            system = {"role": "system", "content": self.system_prompt}
            before = [system, *(message for message in before if message["role"] != "system")]
        return [*before, {**last, "content": self._instructed(last["content"])}]

    def _instructed(self, question: str) -> str:
        return f"{question} {self.instruction}" if self.instruction else question


def question_template(config: PromptConfig, tokenizer: Tokenizer, default_instruction: str = "") -> QuestionTemplate:
    """Return the template that a configuration describes.

    Args:
        config: template, instruction, system prompt and arguments.
        tokenizer: has the chat template.
        default_instruction: instruction where the configuration gives none; the template `none` then adds none.

    Raises:
        InputError: the tokenizer lacks the chat template that the task needs.
        ConfigError: the chat template does not read an argument; the message names the nearest that it reads.
    """
    if config.template == "chat":
        require_chat_template(tokenizer)
        _require_read(config.template_arguments, tokenizer.chat_template)
    default = "" if config.template == "none" else default_instruction
    return QuestionTemplate(
        name=config.template,
        instruction=default if config.instruction is None else config.instruction,
        system_prompt=config.system_prompt,
        arguments=config.template_arguments,
    )


def template_source(config: PromptConfig, tokenizer: Tokenizer, default_instruction: str = "") -> dict[str, str]:
    """Return what determines the prompts apart from the rows, for the record of a run's data."""
    text = str(tokenizer.chat_template) if config.template == "chat" else TEMPLATES.get(config.template, "")
    instruction = default_instruction if config.instruction is None else config.instruction
    found = {"template": config.template, "template text": text_digest(text + instruction)}
    if config.system_prompt is not None:
        found["system prompt"] = text_digest(config.system_prompt)
    if config.template_arguments:
        found["template arguments"] = str(dict(sorted(config.template_arguments.items())))
    return found


def _require_read(arguments: Iterable[str], chat_template: Any) -> None:
    """Refuse an argument that the chat template does not read: it would be ignored silently."""
    sources = list(chat_template.values()) if isinstance(chat_template, Mapping) else [str(chat_template)]
    for name in arguments:
        read = sorted({variable for source in sources for variable in template_variables(source)})
        if name not in read:
            near = difflib.get_close_matches(name, read, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It reads {', '.join(read)}."
            raise ConfigError(
                f"task.template_arguments.{name} is not read by the chat template of the model's tokenizer. {hint}"
            )


def template_variables(source: str) -> set[str]:
    """Return the variables that a Jinja template reads but does not set, apart from those that every rendering gets."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    # transformers adds a tag that marks the assistant's tokens; it reads nothing.
    source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError:  # another extension: accept any word of the template
        return set(re.findall(r"[A-Za-z_]\w*", source))
    return meta.find_undeclared_variables(tree) - {"messages", "add_generation_prompt", "raise_exception"}


def chat_messages(value: Sequence[Any]) -> tuple[Message, ...]:
    """Return a row's chat messages.

    Raises:
        RowError: they are not a list of `role` and `content` whose last message comes from the user.
    """
    fix = "give a list of objects with the texts `role` and `content`, the last of them from the user"
    messages = []
    for position, message in enumerate(value, start=1):
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RowError(f"message {position} of its question has no text for `role` and `content`", fix)
        messages.append({"role": str(texts[0]), "content": str(texts[1])})
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise RowError("the last message of its question is not a text from the user", fix)
    return tuple(messages)
