"""Turn a problem into text, verbatim or through the tokenizer's chat template, and the text into a `Prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from betterhalf.errors import InputError
from betterhalf.tasks.row import Message, RowError
from betterhalf.tasks.task import Tokenizer
from betterhalf.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A prompt before tokenization."""

    prompt_id: str
    text: str
    """Text that the model reads."""
    add_special_tokens: bool
    """True if the tokenizer adds its special tokens; false where the text already holds them."""
    answer: str
    """Gold answer."""
    token_ids: tuple[int, ...] | None = None
    """Token ids of the text where they are given with it; None to tokenize it."""


def plain_draft(prompt_id: str, text: str, *, answer: str) -> Draft:
    """Return a prompt of verbatim text; the tokenizer adds its special tokens."""
    return Draft(prompt_id=prompt_id, text=text, add_special_tokens=True, answer=answer)


def templated_draft(prompt_id: str, text: str, *, answer: str) -> Draft:
    """Return a prompt whose text already holds its special tokens, so that the tokenizer must not add any."""
    return Draft(prompt_id=prompt_id, text=text, add_special_tokens=False, answer=answer)


def chat_draft(tokenizer: Tokenizer, prompt_id: str, question: str, *, answer: str) -> Draft:
    """Return a question from the user, rendered in the tokenizer's own chat template; see `message_draft`."""
    return message_draft(tokenizer, prompt_id, [{"role": "user", "content": question}], answer=answer)


def message_draft(
    tokenizer: Tokenizer,
    prompt_id: str,
    messages: Sequence[Message],
    *,
    answer: str,
    arguments: Mapping[str, Any] | None = None,
) -> Draft:
    """Return chat messages, rendered in the tokenizer's own chat template with further `arguments`.

    Raises:
        InputError: the tokenizer has no chat template.
        RowError: the template cannot render the messages; the message includes the template's error.
    """
    require_chat_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **dict(arguments or {})
        )
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        raise RowError(
            f"the chat template of the model's tokenizer fails with {type(error).__name__}: {error}",
            "correct the template (chat_template.jinja or tokenizer_config.json in the model's folder), or use "
            "another model",
        ) from error
    return templated_draft(prompt_id, text, answer=answer)


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the model's tokenizer has no chat template; use an instruction-tuned model, or set "
            "task.template to 'none', 'r1_distill' or 'qwen_math'"
        )


def encode(tokenizer: Tokenizer, draft: Draft, token_ids: Sequence[int] | None = None) -> Prompt:
    """Tokenize a draft; `token_ids` are the token ids of its text where they are already known."""
    if token_ids is None:
        token_ids = draft.token_ids
    if token_ids is None:
        token_ids = tokenizer.encode(draft.text, add_special_tokens=draft.add_special_tokens)
    return Prompt(prompt_id=draft.prompt_id, text=draft.text, token_ids=tuple(token_ids), answer=draft.answer)


def encode_texts(tokenizer: Tokenizer, drafts: Sequence[Draft]) -> list[list[int]]:
    """Tokenize several drafts in one call, which is several times faster than one by one."""
    found: list[list[int]] = []
    for (given, special), group in groupby(
        drafts, key=lambda each: (each.token_ids is not None, each.add_special_tokens)
    ):
        if given:
            found += [list(draft.token_ids or ()) for draft in group]
            continue
        texts = [draft.text for draft in group]
        found += tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    return found
