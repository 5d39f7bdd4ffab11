"""Load a decoder in FP32, with its tokenizer, from the hub, a local folder, a GGUF file or a built-in name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError
from betterhalf.models.description import ModelDescription, ModelFacts, describe_model
from betterhalf.models.files import explained, quiet
from betterhalf.models.generation import repaired


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(ModelFacts):
    """Decoder on the CPU in FP32, with everything else that sampling needs."""

    module: Any
    """transformers causal language model with parameters and buffers in FP32. Its configuration is `hf_config`, without
    a quantization section."""
    generation_left_out: tuple[str, ...] = ()
    """Settings removed from its generation configuration, since it could not be saved with them."""

    def facts(self) -> ModelFacts:
        """Return everything but the weights."""
        return ModelFacts(**{field.name: getattr(self, field.name) for field in fields(ModelFacts)})


def load_model(config: ModelConfig) -> LoadedModel:
    """Load weights (in FP32), tokenizer and stop tokens.

    Raises:
        InputError: there is no such model, its files cannot be read, it is not a decoder whose sequences can be packed,
            or its tokenizer is missing or belongs to another model.
        MissingExtraError: a package is missing for `smollm2` (extra `[smollm2]`) or for a GGUF file (extra `[gguf]`).
    """
    return load_weights(describe_model(config))


def load_weights(described: ModelDescription) -> LoadedModel:
    """Load the weights of a model whose configuration files have been checked.

    Raises:
        InputError: weights are missing or cannot be read.
    """
    source = described.source
    with quiet(), explained(described.name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=described.hf_config,
            dtype=torch.float32,
            output_loading_info=True,
            **source.arguments,
        )
    module, info = loaded
    _require_whole(described, info["missing_keys"])
    _forget_quantization(module)
    head_notes = _settle_head(described, module)
    module.eval()
    module.generation_config, left_out = repaired(module.generation_config)
    return LoadedModel(
        name=described.name,
        module=module,
        hf_config=module.config,
        tokenizer=described.tokenizer,
        stop_token_ids=described.stop_token_ids,
        turn_end=described.turn_end,
        context_length=described.context_length,
        notes=(*described.notes, *head_notes, *_generation_notes(described.name, left_out)),
        generation_left_out=left_out,
    )


def _forget_quantization(module: Any) -> None:
    """Remove the marks of quantization: a GGUF file's weights are FP32 once loaded, and can be trained and saved."""
    module.config.__dict__.pop("quantization_config", None)
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        module.__dict__.pop(mark, None)


def _settle_head(described: ModelDescription, module: Any) -> tuple[str, ...]:
    """Make `tie_word_embeddings` true to the loaded weights, since engine and export rely on it; return notes on it.

    transformers does not tie a head that differs from the embedding in the files, whatever the configuration says.
    """
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    if bool(module.config.tie_word_embeddings) == tied:
        return ()
    module.config.tie_word_embeddings = tied
    return (
        f"{described.source.named('config.json')} of model {described.name!r} says tie_word_embeddings=true, but its "
        "files hold an LM head that differs from the embedding; that head is used and trained, and export writes "
        "tie_word_embeddings=false",
    )


def _require_whole(described: ModelDescription, missing: Collection[str]) -> None:
    """Refuse missing weights, which transformers would fill with random numbers and only warn about."""
    name = described.name
    if set(missing) == {"lm_head.weight"}:
        raise InputError(
            f"model {name!r} has no lm_head.weight, and its {described.source.named('config.json')} does not say that "
            "the embedding is the LM head; set tie_word_embeddings to true there if it is, or restore the weight"
        )
    if missing:
        raise InputError(
            f"model {name!r} lacks weights of its architecture ({len(missing)}, {min(missing)!r} among them); restore "
            "its files, or use another model"
        )


def _generation_notes(name: str, left_out: Sequence[str]) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (
        f"the generation settings of model {name!r} contradict each other and could not be saved; export leaves out "
        f"{', '.join(left_out)}",
    )
