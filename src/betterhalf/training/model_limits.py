"""Facts of a model's configuration that limit the trainer: the size of attention heads, and dropout."""

from __future__ import annotations

import re
from typing import Any

from betterhalf.errors import InputError

_DROPOUT = re.compile(r"^(?!classifier|summary|adapter).*(dropout|dropout_prob|pdrop|layerdrop)$")
"""Dropout keys of transformers configurations; those of adapters and of heads other than the LM head do not count."""


def head_dim_of(hf_config: Any) -> int:
    """Return the size of an attention head."""
    given = getattr(hf_config, "head_dim", None)
    return int(given or hf_config.hidden_size // hf_config.num_attention_heads)


def require_no_dropout(hf_config: Any) -> None:
    """Refuse a model whose configuration has dropout.

    Raises:
        InputError: the model has dropout; the message names the key.
    """
    for key, value in hf_config.to_dict().items():
        if _DROPOUT.search(key) and isinstance(value, int | float) and value:
            raise InputError(
                f"the model has {key}={value}, which would make the trained policy random; set {key} to 0 in its "
                "config.json"
            )
