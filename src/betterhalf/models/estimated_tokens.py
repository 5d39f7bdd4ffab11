"""Estimated lengths of prompts, for `plan` and a model of which only the configuration file is present."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from betterhalf.config.schema import ModelConfig
from betterhalf.models.context import context_length
from betterhalf.models.description import ModelFacts, describe_model
from betterhalf.models.files import explained, find_model, has_tokenizer, quiet

BYTES_PER_TOKEN = 3
"""UTF-8 bytes that count as a token. Tokenizers of 32k to 150k tokens take 3 to 5 for English, and fewer for digits."""


class EstimatedTokens:
    """Stand-in for a tokenizer: it gives a text about as many tokens as a real one would, all of them 0."""

    chat_template = "estimated"
    """Non-empty, so that chat messages are accepted; `apply_chat_template` renders them."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return one token for every `BYTES_PER_TOKEN` bytes of the text, rounded up; at least one."""
        return [0] * max(1, -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN))

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True, return_attention_mask: bool = True
    ) -> dict[str, list[list[int]]]:
        """Return the tokens of several texts."""
        return {"input_ids": [self.encode(each) for each in text]}

    def decode(self, token_ids: list[int]) -> str:
        """Return spaces, as many as the bytes that the tokens stand for."""
        return " " * (BYTES_PER_TOKEN * len(token_ids))

    def apply_chat_template(
        self, conversation: Sequence[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **arguments: Any
    ) -> str:
        """Return the role and the text of each message, on a line each."""
        return "".join(f"{message['role']}\n{message['content']}\n" for message in conversation)


def describe_for_plan(config: ModelConfig) -> ModelFacts:
    """Read a model's configuration files; without those of a tokenizer, prompt lengths are estimated.

    Raises:
        InputError: see `describe_model`; a folder needs config.json alone.
    """
    source = find_model(config, tokenizer=False)
    if source.gguf is not None or has_tokenizer(source.location):
        return describe_model(config)
    with quiet(), explained(config.name):
        hf_config = AutoConfig.from_pretrained(source.location, **source.arguments)
    return ModelFacts(
        name=config.name,
        hf_config=hf_config,
        tokenizer=EstimatedTokens(),
        stop_token_ids=(),
        context_length=context_length(hf_config),
        notes=(
            f"model {config.name!r} has no tokenizer here, so prompts count a token for every {BYTES_PER_TOKEN} bytes; "
            "put its tokenizer into the folder for their exact lengths",
        ),
    )
