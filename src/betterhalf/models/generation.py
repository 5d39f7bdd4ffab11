"""Generation configuration of a model, and checks that a loaded model can be saved again."""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import GenerationConfig

from betterhalf.errors import InputError
from betterhalf.models.files import ModelSource, first_line, quiet

FILE = "generation_config.json"
"""Name of the generation configuration in a model folder."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size")
"""Settings that change the distribution that `generate` samples from."""

_FIRST = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample")
"""Settings that take precedence where settings exclude each other."""


def read_generation(source: ModelSource) -> GenerationConfig | None:
    """Read `generation_config.json`; None for a model without one.

    Raises:
        InputError: the file exists but cannot be read.
    """
    if source.gguf is not None:
        return None
    try:
        with quiet():
            found: GenerationConfig = GenerationConfig.from_pretrained(source.location, **source.arguments)
    except (OSError, ValueError) as error:
        if source.holds(FILE):
            raise InputError(
                f"{FILE} of {source.location} cannot be read ({first_line(error)}); fix or delete it"
            ) from error
        if isinstance(error, OSError):
            return None
        raise
    return found


def sampling_notes(name: str, generation: GenerationConfig | None) -> tuple[str, ...]:
    """Return a note on settings of sampling in `generation_config.json`, which are never applied."""
    if generation is None:
        return ()
    given = generation.to_diff_dict()
    found = [f"{key}={given[key]:g}" for key in _SAMPLING if isinstance(given.get(key), int | float)]
    if not found:
        return ()
    return (
        f"{FILE} of model {name!r} asks for {', '.join(found)}, which is not applied: the section [sampling] alone "
        "decides how completions are sampled, by every engine",
    )


def can_be_saved(generation: GenerationConfig) -> bool:
    """Return whether `save_pretrained` accepts the configuration; it refuses settings that exclude each other."""
    try:
        with quiet():
            generation.validate(strict=True)
    except ValueError:
        return False
    return True


def repaired(generation: GenerationConfig) -> tuple[GenerationConfig, tuple[str, ...]]:
    """Return a generation configuration that can be saved, and the names of the settings it had to leave out.

    Token ids and `do_sample` stay, so that generation stops and samples as before. Other settings are left out if
    transformers refuses them next to these, such as a temperature without sampling.
    """
    if can_be_saved(generation):
        return generation, ()
    given = {key: value for key, value in generation.to_diff_dict().items() if key != "transformers_version"}
    kept: dict[str, Any] = {}
    for key in sorted(given, key=lambda name: (name not in _FIRST, name)):
        if _accepted(kept | {key: given[key]}):
            kept[key] = given[key]
    return _made(kept), tuple(sorted(given.keys() - kept.keys()))


def _made(settings: dict[str, Any]) -> GenerationConfig:
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


def _accepted(settings: dict[str, Any]) -> bool:
    try:
        with quiet():
            return can_be_saved(_made(settings))
    except (ValueError, TypeError):
        return False


def why_not_saved(hf_config: Any) -> str | None:
    """Return the error of `save_pretrained` for a model configuration; None if it can be saved."""
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            hf_config.save_pretrained(folder)
    except Exception as error:  # validators raise all kinds of exceptions
        return first_line(error)
    return None
