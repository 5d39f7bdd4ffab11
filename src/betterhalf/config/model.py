"""The section `[model]`."""

from __future__ import annotations

from typing import ClassVar

from betterhalf.config.section import Section


class ModelConfig(Section):
    """Which model is trained."""

    shorthand: ClassVar[str | None] = "name"

    name: str = "demo"
    """Hugging Face name, local folder, GGUF file, or one of the two built in: `demo`, `smollm2`."""
    revision: str | None = None
    """Branch, tag or commit, when `name` is a hub name."""
    stop_tokens: tuple[str | int, ...] = ()
    """Tokens that end a completion, by text or id, such as `<|im_end|>`, instead of those that the model's files
    declare; empty: as declared (`eos_token_id` of its generation configuration and configuration, the tokenizer's
    `eos_token`)."""
    allow_no_stop_token: bool = False
    """Sample although no token ends a completion: all of them run to `sampling.max_tokens`."""
