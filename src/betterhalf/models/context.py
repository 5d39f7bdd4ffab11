"""Context length of a model, limited to lengths at which trainer and engines use the same rope frequencies."""

from __future__ import annotations

from typing import Any


def rope_settings(hf_config: Any) -> list[dict[str, Any]]:
    """Return the rope parameters of a configuration, one dictionary for each kind of layer that has its own."""
    found = getattr(hf_config, "rope_parameters", None) or {}
    each = [value for value in found.values() if isinstance(value, dict)]
    return each or ([dict(found)] if found else [])


_UNLIMITED = 2**20
"""Context of a decoder without positions, such as a recurrent one, whose configuration states no limit."""


def _declared(hf_config: Any) -> int:
    return int(getattr(hf_config, "max_position_embeddings", None) or _UNLIMITED)


def context_length(hf_config: Any) -> int:
    """Return the maximum number of positions, prompt and completion together.

    `longrope` has two tables of frequencies. transformers takes the one for long sequences if any sequence of a pack is
    longer than the length of pretraining, and vLLM if any could be. With sequences below that length, and room for
    vLLM's one token more, both always take the one for short sequences.
    """
    length = _declared(hf_config)
    for settings in rope_settings(hf_config):
        if settings.get("rope_type") == "longrope":
            length = min(length, int(settings["original_max_position_embeddings"]) - 1)
    return length


def context_notes(name: str, hf_config: Any) -> tuple[str, ...]:
    """Return a note if the context is shorter than the configuration says."""
    length, declared = context_length(hf_config), _declared(hf_config)
    if length == declared:
        return ()
    return (
        f"rope scaling 'longrope' of model {name!r} has other frequencies from {length + 1} tokens on; its context is "
        f"limited to {length} tokens (of {declared}), so that all sequences have the same",
    )
