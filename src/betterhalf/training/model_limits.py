"""Limits that a model's configuration sets to the trainer: the size of its heads, and dropout."""

from __future__ import annotations

from typing import Any

from betterhalf.errors import InputError


def head_dim_of(hf_config: Any) -> int:
    """Return the size of an attention head."""
    given = getattr(hf_config, "head_dim", None)
    return int(given or hf_config.hidden_size // hf_config.num_attention_heads)


def require_no_dropout(hf_config: Any) -> None:
    """Refuse a model whose configuration has dropout.

    Raises:
        InputError: the model has dropout; the message names the key.
    """
    for key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(hf_config, key, 0):
            raise InputError(
                f"the model has {key}={getattr(hf_config, key)}, which would make the trained policy random; "
                f"set {key} to 0 in its config.json"
            )
