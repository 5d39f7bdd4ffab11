"""Load a decoder in FP32, with its tokenizer, from the hub, a local folder, a GGUF file or a built-in name.

`load_weights` loads it whole. `open_weights` reads no weight: each rank of a sharded trainer then reads its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError
from betterhalf.models.description import ModelDescription, ModelFacts, describe_model
from betterhalf.models.files import explained, quiet
from betterhalf.models.generation import read_generation, repaired
from betterhalf.models.gguf import forget_reader
from betterhalf.models.row_source import RowSource
from betterhalf.models.skeleton import compute_buffers, skeleton
from betterhalf.models.weight_files import WeightFiles, weight_paths


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(ModelFacts):
    """Decoder on the CPU in FP32, with everything else that sampling needs."""

    module: Any
    """transformers causal language model with parameters and buffers in FP32. Its configuration is `hf_config`, without
    a quantization section."""
    generation_left_out: tuple[str, ...] = ()
    """Settings removed from its generation configuration, since it could not be saved with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkeletonModel(ModelFacts):
    """Decoder whose parameters have no storage yet, with the source of their values."""

    module: Any
    """transformers causal language model with FP32 parameters on the meta device and computed buffers on the CPU."""
    weights: RowSource
    """Values of the parameters."""


def load_model(config: ModelConfig) -> LoadedModel:
    """Load weights (in FP32), tokenizer and stop tokens.

    Raises:
        InputError: there is no such model, its files cannot be read, it is not a decoder whose sequences can be packed,
            or its tokenizer is missing or belongs to another model.
        ConfigError: `model.stop_tokens` names a text that is not a single token.
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
            config=_as_in_files(described),
            dtype=torch.float32,
            output_loading_info=True,
            **source.arguments,
        )
    forget_reader()
    module, info = loaded
    _require_whole(described, info["missing_keys"])
    if described.file_vocabulary != described.hf_config.vocab_size:
        module.resize_token_embeddings(described.hf_config.vocab_size, mean_resizing=False)
    _forget_quantization(module)
    head_notes = _settle_head(described, module)
    module.eval()
    module.generation_config, left_out = repaired(module.generation_config)
    notes = (*described.notes, *head_notes, *_generation_notes(described.name, left_out))
    return LoadedModel(**_facts(described, module, notes), module=module, generation_left_out=left_out)


def open_weights(described: ModelDescription) -> SkeletonModel | None:
    """Check a model's weights in the headers of its files, without reading them.

    Returns:
        The model without its weights. None if rows of them cannot be read: for GGUF and `.bin` files, for tensors that
        transformers converts by other rules than stacking experts, and for buffers whose values only the files hold.
        `load_weights` loads such a model.

    Raises:
        InputError: weights are missing or have another shape, or a file is damaged.
    """
    with quiet(), explained(described.name):
        paths = weight_paths(described.source)
        if paths is None:
            return None
        module = skeleton(deepcopy(described.hf_config))
        files = None if compute_buffers(module) else WeightFiles.open(paths, module)
        if files is None:
            return None
        _tie_as_stored(module, files)
    expected = dict(module.named_parameters())
    _require_whole(described, expected.keys() - files.names)
    with explained(described.name):
        _require_shapes(described, module, files)
    head_notes = _settle_head(described, module)
    module.eval()
    _, left_out = repaired(read_generation(described.source) or module.generation_config)
    notes = (*described.notes, *head_notes, *_generation_notes(described.name, left_out))
    return SkeletonModel(**_facts(described, module, notes), module=module, weights=files)


def _facts(described: ModelDescription, module: Any, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of `ModelFacts`, updated by what the weights have shown."""
    return described.fields() | {"hf_config": module.config, "notes": notes}


def _tie_as_stored(module: Any, files: WeightFiles) -> None:
    """Tie or untie head and embedding of a skeleton as `from_pretrained` does.

    A tied pair may be stored under either name. It is untied if both are stored and differ.
    """
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    (tied,) = (name for name, parameter in module.named_parameters() if parameter is head.weight)
    every = module.named_parameters(remove_duplicate=False)
    for other in [name for name, parameter in every if parameter is head.weight and name != tied]:
        if other not in files.names:
            continue
        if tied not in files.names:
            files.alias(tied, other)
        elif not files.equal(tied, other):
            head.weight = nn.Parameter(torch.empty_like(head.weight))


def _require_shapes(described: ModelDescription, module: Any, files: WeightFiles) -> None:
    padded = {part.weight for part in (module.get_input_embeddings(), module.get_output_embeddings())}
    for name, parameter in module.named_parameters():
        found, shape = files.shape(name), tuple(parameter.shape)
        if parameter in padded:
            shape = (described.file_vocabulary, *shape[1:])
        if found != shape:
            raise InputError(
                f"the files of model {described.name!r} hold {name!r} in shape {found}, and its config.json asks for "
                f"{shape}; restore its files, or use another model"
            )


def _as_in_files(described: ModelDescription) -> Any:
    """Return the configuration with the vocabulary of the files, padding included."""
    if described.file_vocabulary == described.hf_config.vocab_size:
        return described.hf_config
    config = deepcopy(described.hf_config)
    config.vocab_size = described.file_vocabulary
    return config


def _forget_quantization(module: Any) -> None:
    """Remove the marks of quantization: a GGUF file's weights are FP32 once loaded, and can be trained and saved."""
    module.config.__dict__.pop("quantization_config", None)
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        module.__dict__.pop(mark, None)


def _settle_head(described: ModelDescription, module: Any) -> tuple[str, ...]:
    """Make `tie_word_embeddings` match the loaded weights, since engine and export rely on it; return notes on it.

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
