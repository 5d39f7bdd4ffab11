"""Facts from a model's configuration files, read before any of its weights."""

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
"""Key under which transformers remembers that it has warned of long texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A decoder as its files describe it, with everything around its weights."""

    name: str
    """Name, path or file in the user's words."""
    hf_config: Any
    """Its transformers configuration."""
    tokenizer: Any
    """transformers tokenizer."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a completion, sorted: those of `model.stop_tokens`, or those that the files declare."""
    context_length: int
    """Positions the model can attend over: prompt and completion together."""
    turn_end: TurnEnd | None = None
    """The token with which the chat template ends the assistant's turn, if it shows one."""
    notes: tuple[str, ...] = ()
    """Notes on these files for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription(ModelFacts):
    """`ModelFacts` before the weights are read, and where these are."""

    source: ModelSource
    stop_tokens: tuple[StopToken, ...]
    """The tokens of `stop_token_ids`, each with the place that declares it."""


def describe_model(config: ModelConfig) -> ModelDescription:
    """Read configuration, tokenizer and stop tokens, and refuse what they show cannot be trained.

    Raises:
        InputError: no such model, files that cannot be read, not a decoder whose sequences can be packed, or a
            tokenizer that does not belong to it.
        MissingExtraError: `smollm2` or a GGUF file without the extra `[smollm2]`.
    """
    source = find_model(config)
    flags = {} if source.gguf is None else tokenizer_flags(source.gguf)
    with quiet(), explained(config.name):
        hf_config = AutoConfig.from_pretrained(source.location, **source.arguments)
        _require_plain_weights(config.name, hf_config)
        require_packable(_skeleton(hf_config))
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments, **flags)
        generation = read_generation(source)
    # Prompts beyond the context are refused by name; its own warning of them would come on top.
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
    """The transformers module on the meta device: names and shapes, no numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)  # type: ignore[no-untyped-call]


def _require_plain_weights(name: str, hf_config: Any) -> None:
    """Quantized weights are no parameters: nothing could be learned."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method == "gguf":
        return
    raise InputError(
        f"model {name!r} holds quantized weights (quantization_config in config.json, {method or 'unnamed'}), which "
        "cannot be trained; name the model that it was made from"
    )


def _require_own_tokenizer(name: str, tokenizer: Any, vocabulary: int) -> None:
    """Tokens that were added may lie beyond the model's vocabulary and never be used; ordinary ones may not."""
    if tokenizer.vocab_size > vocabulary:
        raise InputError(
            f"model {name!r} has a vocabulary of {vocabulary} tokens (vocab_size in config.json), its tokenizer one of "
            f"{tokenizer.vocab_size}, so they do not belong together; put the model's own tokenizer beside it"
        )
