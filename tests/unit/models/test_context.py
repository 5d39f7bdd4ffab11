"""The context of a model with `longrope` ends where its frequencies would change."""

from __future__ import annotations

from tests.tiny_families import FAMILIES, family_config

from betterhalf.models.context import context_length, context_notes


def test_longrope_limits_the_context_and_says_so() -> None:
    config = family_config(FAMILIES["phi3, partial rope, longrope"])
    assert context_length(config) == 47
    (note,) = context_notes("mini", config)
    assert "from 48 tokens on; its context is limited to 47 tokens (of 96)" in note


def test_other_ropes_keep_the_context() -> None:
    for name in ("llama", "llama, rope yarn", "gemma3_text"):
        config = family_config(FAMILIES[name])
        assert context_length(config) == 96 and context_notes(name, config) == ()
