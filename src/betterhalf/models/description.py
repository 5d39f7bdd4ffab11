"""Description of a model from its configuration files, read before its weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError
from betterhalf.models.context import context_length, context_notes
from betterhalf.models.files import ModelSource, explained, find_model, quiet
from betterhalf.models.generation import read_generation, sampling_notes, why_not_saved
from betterhalf.models.gguf import tokenizer_flags
from betterhalf.models.packability import require_packable
from betterhalf.models.padding import known_tokens, padding_notes
from betterhalf.models.skeleton import skeleton
from betterhalf.models.stop_tokens import (
    StopToken,
    TurnEnd,
    chosen_stop_tokens,
    declared_stop_tokens,
    turn_end,
)

_LENGTH_WARNING = "sequence-length-is-longer-than-the-specified-maximum"
"""Key with which transformers records that it has warned of a long text."""


def is_mixture(hf_config: Any) -> bool:
    """Return whether a transformers configuration is that of a mixture of experts."""
    return any(getattr(hf_config, key, 0) for key in ("num_experts", "num_local_experts"))


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
    unpackable: str | None = None
    """Reason why the trainer cannot keep packed sequences of this model apart; None if it can."""

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts."""
        return is_mixture(self.hf_config)

    def facts(self) -> ModelFacts:
        """Return these facts alone, without the further fields of a loaded or described model."""
        return ModelFacts(**self.fields())

    def fields(self) -> dict[str, Any]:
        """Return name and value of each of these facts."""
        return {field.name: getattr(self, field.name) for field in fields(ModelFacts)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription(ModelFacts):
    """`ModelFacts` of a model whose weights have not been read yet, with their location."""

    source: ModelSource
    """Location of the model's files."""
    stop_tokens: tuple[StopToken, ...]
    """Tokens of `stop_token_ids`, each with the setting or file that declares it."""
    file_vocabulary: int
    """Rows of the embedding in the files; the first `hf_config.vocab_size` of them have a token."""


def describe_model(config: ModelConfig, *, packed: bool = True) -> ModelDescription:
    """Read configuration, tokenizer and stop tokens; refuse a model that cannot be trained.

    Set `packed` to False to accept a decoder whose sequences cannot be packed, which `unpackable` then explains.

    Raises:
        InputError: there is no such model, its files cannot be read, it is not a decoder whose sequences can be packed,
            or the tokenizer does not belong to it.
        ConfigError: `model.stop_tokens` names a text that is not a single token.
        MissingExtraError: a package is missing for `smollm2` (extra `[smollm2]`) or for a GGUF file (extra `[gguf]`).
    """
    source = find_model(config)
    flags = {} if source.gguf is None else tokenizer_flags(source.gguf)
    with quiet(), explained(config.name):
        hf_config = AutoConfig.from_pretrained(source.location, **source.arguments)
        _require_plain_weights(config.name, hf_config)
        unpackable = _why_unpackable(hf_config)
        if unpackable and packed:
            raise InputError(unpackable)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments, **flags)
        generation = read_generation(source)
    # Tasks refuse prompts that exceed the context, so the tokenizer's own warning is not needed.
    tokenizer.deprecation_warnings[_LENGTH_WARNING] = True
    _require_own_tokenizer(config.name, tokenizer, hf_config.vocab_size)
    stops = chosen_stop_tokens(config.stop_tokens, tokenizer) or declared_stop_tokens(
        source, hf_config, generation, tokenizer
    )
    rows, hf_config.vocab_size = hf_config.vocab_size, known_tokens(hf_config, tokenizer, stops)
    why = why_not_saved(hf_config)
    return ModelDescription(
        name=config.name,
        hf_config=hf_config,
        tokenizer=tokenizer,
        stop_token_ids=tuple(stop.token_id for stop in stops),
        stop_tokens=stops,
        turn_end=turn_end(tokenizer),
        context_length=context_length(hf_config),
        notes=(
            *(() if why is None else (f"model {config.name!r} could not be exported after training: {why}",)),
            *context_notes(config.name, hf_config),
            *padding_notes(config.name, rows, hf_config.vocab_size),
            *sampling_notes(config.name, generation),
        ),
        file_vocabulary=rows,
        unpackable=unpackable,
        source=source,
    )


def _why_unpackable(hf_config: Any) -> str | None:
    try:
        require_packable(skeleton(hf_config))
    except InputError as error:
        return str(error)
    return None


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
