"""Turn the text of an observation into tokens: verbatim, or as a message of the chat template.

The sampled tokens are never tokenized again: what stands between two turns is encoded on its own and inserted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from betterhalf.errors import InputError
from betterhalf.tasks.prompting import require_chat_template
from betterhalf.tasks.task import Tokenizer

_QUESTION, _ANSWER, _OBSERVATION = "betterhalf question", "betterhalf answer", "betterhalf observation"
"""Contents of the conversation that is rendered to see what a template puts around an observation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Text around an observation."""

    before: str = ""
    """Text between a turn of the model and the observation; it begins with the end of that turn."""
    after: str = ""
    """Text between the observation and the next turn."""


def chat_frame(tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None) -> Frame:
    """Return what the tokenizer's chat template puts around a message from the user that follows an answer.

    Raises:
        InputError: the tokenizer has no chat template, or one that cannot render such a conversation.
    """
    require_chat_template(tokenizer)
    messages = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _OBSERVATION},
    ]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **dict(arguments or {})
        )
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        raise InputError(
            f"the chat template of the model's tokenizer cannot render a second turn ({type(error).__name__}: "
            f"{error}); use another model, or set task.template=none"
        ) from error
    _, answer, rest = text.partition(_ANSWER)
    before, observation, after = rest.partition(_OBSERVATION)
    if not answer or not observation:
        raise InputError(
            "the chat template of the model's tokenizer changes the texts of a conversation, so the tokens of an "
            "observation cannot be found; use another model, or set task.template=none"
        )
    return Frame(before=before, after=after)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationEncoder:
    """Encoder of observations."""

    tokenizer: Tokenizer
    frame: Frame
    """Text around each observation."""
    max_tokens: int
    """Maximum number of tokens of an observation, without its frame."""

    def encode(self, observation: str, stop_token: int) -> tuple[int, ...]:
        """Return the tokens that the model reads after a turn that ended with `stop_token`."""
        token_ids = self._encoded(observation)
        if len(token_ids) > self.max_tokens:
            token_ids = token_ids[: self.max_tokens]
            observation = self.tokenizer.decode(token_ids)
        if self.frame == Frame():
            return tuple(token_ids)
        return tuple(self._encoded(self._after(stop_token) + observation + self.frame.after))

    def _after(self, stop_token: int) -> str:
        """Return the text before the observation, without the end of the turn, which the model has sampled itself."""
        end = self.tokenizer.decode([stop_token])
        _, found, rest = self.frame.before.partition(end)
        return rest if end and found else self.frame.before

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
