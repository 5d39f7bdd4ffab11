"""Small decoders of every family for tests, with random weights that a seed determines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.models.loading import LoadedModel, SkeletonModel
from betterhalf.models.skeleton import compute_buffers, skeleton

Sizes = dict[str, Any]

TINY: Sizes = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
"""Two layers, which run in milliseconds."""
SMALL: Sizes = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
"""Three layers, with weights large enough that roundings change the logprobs."""
CUDA: Sizes = {
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 640,
}
"""Shapes that a GPU's half-precision kernels accept."""

_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "olmoe": OlmoeConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}

EXPERTS: Sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
"""Sizes of a mixture of experts, beside those above."""


def tiny_config(family: str = "llama", sizes: Sizes = TINY, **changes: Any) -> Any:
    """Return transformers' configuration of a small decoder without special tokens; `changes` override `sizes`."""
    return _CONFIGS[family](**{"bos_token_id": None, "eos_token_id": None, **sizes, **changes})


def tiny_module(config: Any, *, seed: int, biases: float = 0.0, norms: float = 0.0) -> Any:
    """Return the FP32 module of `config` with random weights, in evaluation mode.

    Args:
        config: as from `tiny_config`.
        seed: determines every weight.
        biases: standard deviation of the biases, which transformers starts at 0.
        norms: standard deviation of the norms' weights around 1, where transformers starts them.
    """
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = biases if name.endswith("bias") else norms if "norm" in name else 0.0
            if spread:
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return module


def loaded_model(module: Any, *, stop_token_ids: tuple[int, ...] = (0,)) -> LoadedModel:
    """Return `module` as `load_model` would, but without a tokenizer."""
    return LoadedModel(
        name=f"tiny {module.config.model_type}",
        module=module,
        hf_config=module.config,
        tokenizer=None,
        stop_token_ids=stop_token_ids,
        context_length=module.config.max_position_embeddings,
    )


def tiny_model(
    family: str = "llama", sizes: Sizes = TINY, *, seed: int, stop_token_ids: tuple[int, ...] = (0,), **changes: Any
) -> LoadedModel:
    """Return a small random decoder as a loaded model: `tiny_config`, `tiny_module` and `loaded_model` in one."""
    return loaded_model(tiny_module(tiny_config(family, sizes, **changes), seed=seed), stop_token_ids=stop_token_ids)


class TensorRows:
    """Weights in memory as a `RowSource`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def rows(self, wanted: Mapping[str, ShardRange]) -> Iterator[tuple[str, Tensor]]:
        for name, rows in wanted.items():
            yield name, self.weights[name][rows.rows]


def skeleton_model(model: LoadedModel) -> SkeletonModel:
    """Return a model for a sharded trainer, with the weights of `model`."""
    module = skeleton(model.hf_config).eval()
    assert compute_buffers(module) == ()
    weights = {name: parameter.detach() for name, parameter in model.module.named_parameters()}
    return SkeletonModel(**model.fields(), module=module, weights=TensorRows(weights))
