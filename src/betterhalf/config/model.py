"""The section `[model]`: the model to train."""

from __future__ import annotations

from typing import ClassVar

from betterhalf.config.section import Section


class ModelConfig(Section):
    """The model to train."""

    shorthand: ClassVar[str | None] = "name"

    name: str = "demo"
    """Hugging Face name, local folder, GGUF file, or one of the two built in: `demo`, `smollm2`."""
    revision: str | None = None
    """Branch, tag or commit, when `name` is a hub name."""
    stop_tokens: tuple[str | int, ...] = ()
    """Tokens that end a completion, by text or id, such as `<|im_end|>`. They replace those that the model's files
    declare (`eos_token_id` in its generation configuration and its configuration, `eos_token` of its tokenizer); empty
    for the declared ones."""
    allow_no_stop_token: bool = False
    """Allow a model without a stop token; all its completions are `sampling.max_tokens` long."""
