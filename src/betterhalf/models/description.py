"""Description of a model from its configuration files, read before its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError
from betterhalf.models.attention import require_packable
from betterhalf.models.files import ModelSource, explained, find_model, quiet
from betterhalf.models.generation import read_generation, why_not_saved
from betterhalf.models.gguf import tokenizer_flags
from betterhalf.models.stop_tokens import (
    StopToken,
    TurnEnd,
    chosen_stop_tokens,
    declared_stop_tokens,
    turn_end,
)

_LENGTH_WARNING = "sequence-length-is-longer-than-the-specified-maximum"
"""Key with which transformers records that it has warned of a long text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about a decoder from its files, apart from the weights."""

    name: str
    """Name, path or file, as the user wrote it."""
    hf_config: Any
    """transformers configuration."""
    tokenizer: Any
    """transformers tokenizer."""
    stop_token_ids: tuple[int, ...]
    """Sorted ids of the tokens that end a completion: those of `model.stop_tokens`, or those that the files declare."""
    context_length: int
    """Maximum number of positions, prompt and completion together."""
    turn_end: TurnEnd | None = None
    """Token with which the chat template ends the assistant's turn; None if it shows none."""
    notes: tuple[str, ...] = ()
    """Notes on the files for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription(ModelFacts):
    """`ModelFacts` of a model whose weights have not been read yet, with their location."""

    source: ModelSource
    """Location of the model's files."""
    stop_tokens: tuple[StopToken, ...]
    """Tokens of `stop_token_ids`, each with the setting or file that declares it."""


def describe_model(config: ModelConfig) -> ModelDescription:
    """Read configuration, tokenizer and stop tokens; refuse a model that they show cannot be trained.

    Raises:
        InputError: there is no such model, its files cannot be read, it is not a decoder whose sequences can be packed,
            or the tokenizer does not belong to it.
        MissingExtraError: a package is missing for `smollm2` (extra `[smollm2]`) or for a GGUF file (extra `[gguf]`).
    """
    source = find_model(config)
    flags = {} if source.gguf is None else tokenizer_flags(source.gguf)
    with quiet(), explained(config.name):
        hf_config = AutoConfig.from_pretrained(source.location, **source.arguments)
        _require_plain_weights(config.name, hf_config)
        require_packable(_skeleton(hf_config))
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments, **flags)
        generation = read_generation(source)
    # Tasks refuse prompts that exceed the context, so the tokenizer's own warning is not needed.
    tokenizer.deprecation_warnings[_LENGTH_WARNING] = True
    _require_own_tokenizer(config.name, tokenizer, hf_config.vocab_size)
    stops = chosen_stop_tokens(config.stop_tokens, tokenizer) or declared_stop_tokens(
        source, hf_config, generation, tokenizer
    )
    why = why_not_saved(hf_config)
    return ModelDescription(
        name=config.name,
        hf_config=hf_config,
        tokenizer=tokenizer,
        stop_token_ids=tuple(stop.token_id for stop in stops),
        stop_tokens=stops,
        turn_end=turn_end(tokenizer),
        context_length=int(hf_config.max_position_embeddings),
        notes=() if why is None else (f"model {config.name!r} could not be exported after training: {why}",),
        source=source,
    )


def _skeleton(hf_config: Any) -> Any:
    """Return the transformers module on the meta device: names and shapes without data."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)  # type: ignore[no-untyped-call]


def _require_plain_weights(name: str, hf_config: Any) -> None:
    """Refuse quantized weights, which are not trainable parameters; GGUF files are dequantized when loaded."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method == "gguf":
        return
    raise InputError(
        f"model {name!r} holds quantized weights (quantization_config in config.json, {method or 'unnamed'}), which "
        "cannot be trained; use the model that was quantized"
    )


def _require_own_tokenizer(name: str, tokenizer: Any, vocabulary: int) -> None:
    """Refuse a tokenizer with ordinary tokens beyond the model's vocabulary; added tokens may exceed it unused."""
    if tokenizer.vocab_size > vocabulary:
        raise InputError(
            f"model {name!r} has a vocabulary of {vocabulary} tokens (vocab_size in config.json), but its tokenizer "
            f"has {tokenizer.vocab_size}, so they do not belong together; put the model's own tokenizer into its folder"
        )
