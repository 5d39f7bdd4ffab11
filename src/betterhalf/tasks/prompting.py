"""Text to `Prompt`: as it stands, or through the tokenizer's chat template."""

from __future__ import annotations

from betterhalf.errors import InputError
from betterhalf.tasks.task import Tokenizer
from betterhalf.types import Prompt


def plain_prompt(tokenizer: Tokenizer, prompt_id: str, text: str, *, answer: str) -> Prompt:
    """A prompt whose text the model reads as it stands; the tokenizer adds its special tokens."""
    return Prompt(prompt_id=prompt_id, text=text, token_ids=tuple(tokenizer.encode(text)), answer=answer)


def templated_prompt(tokenizer: Tokenizer, prompt_id: str, text: str, *, answer: str) -> Prompt:
    """A prompt whose text already holds its special tokens, so that the tokenizer must not add any."""
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return Prompt(prompt_id=prompt_id, text=text, token_ids=token_ids, answer=answer)


def chat_prompt(tokenizer: Tokenizer, prompt_id: str, question: str, *, answer: str) -> Prompt:
    """A question from the user, in the tokenizer's own chat template.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the model's tokenizer has no chat template; take an instruction-tuned model, or for the math task set "
            "task.template to 'none', 'r1_distill' or 'qwen_math'"
        )
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return templated_prompt(tokenizer, prompt_id, text, answer=answer)
