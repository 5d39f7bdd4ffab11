"""A tiny random decoder of every architecture of transformers that can be trained, or is refused, with its settings.

`docs/engines.md` has a row for each; `python -m tests.family_matrix` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Sizes of every tiny model: widths are multiples of 32, as vLLM's attention on a CPU needs."""

WINDOW = 5
"""Sliding window, shorter than the sequences."""

_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SOFT_CAPPED = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 2.0,
}
"""Soft-caps far below those of real models, so that tiny random ones reach them."""
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
    "head_dim": None,
}

_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFamily:
    """One row of the matrix."""

    model_type: str
    """transformers `model_type`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings besides `SIZES`; None removes one of those."""
    models: str = ""
    """Models of this kind that people know."""


def _row(model_type: str, models: str, **changes: Any) -> TinyFamily:
    return TinyFamily(model_type=model_type, models=models, changes=changes)


FAMILIES: dict[str, TinyFamily] = {
    "llama": _row("llama", "Llama 2, SmolLM2", tie_word_embeddings=True),
    "llama, attention and MLP bias": _row("llama", "", attention_bias=True, mlp_bias=True),
    "llama, rope llama3": _row("llama", "Llama 3.1 to 3.3", rope_parameters=_LLAMA3),
    "llama, rope linear": _row("llama", "", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "llama, rope yarn": _row("llama", "", rope_parameters=_YARN),
    "llama, rope dynamic": _row(
        "llama", "", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    ),
    "mistral": _row("mistral", "Mistral 7B", sliding_window=WINDOW),
    "ministral": _row("ministral", "Ministral 8B", **_SLIDING),
    "ministral3": _row("ministral3", "Ministral 3"),
    "qwen2": _row("qwen2", "Qwen2, Qwen2.5", tie_word_embeddings=True),
    "qwen2, sliding": _row("qwen2", "", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": _row("qwen3", "Qwen3"),
    "gemma": _row("gemma", "Gemma"),
    "gemma2": _row("gemma2", "Gemma 2", **_SOFT_CAPPED),
    "gemma2, no attention soft-cap": _row(
        "gemma2", "", sliding_window=WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=None
    ),
    "gemma3_text": _row("gemma3_text", "Gemma 3 270M and 1B", **_SLIDING, query_pre_attn_scalar=24),
    "gemma4_text": _row("gemma4_text", "Gemma 4"),
    "vaultgemma": _row("vaultgemma", "VaultGemma", **_SOFT_CAPPED),
    "phi": _row("phi", "Phi-1.5, Phi-2"),
    "phi3": _row("phi3", "Phi-3, Phi-4", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "phi3, partial rope, longrope": _row(
        "phi3",
        "Phi-4-mini",
        max_position_embeddings=96,
        original_max_position_embeddings=48,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 48,
            "short_factor": [1.0 + 0.1 * k for k in range(12)],
            "long_factor": [2.0 + 0.3 * k for k in range(12)],
        },
    ),
    "olmo": _row("olmo", "OLMo"),
    "olmo2": _row("olmo2", "OLMo 2"),
    "olmo3": _row("olmo3", "OLMo 3", **_SLIDING),
    "smollm3": _row("smollm3", "SmolLM3", no_rope_layers=[1, 1, 0, 1]),
    "granite": _row(
        "granite",
        "Granite 3",
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.1,
        logits_scaling=1.5,
    ),
    "granite_swa": _row("granite_swa", "Granite", sliding_window=WINDOW),
    "cohere": _row("cohere", "Command R", logit_scale=0.5),
    "cohere2": _row("cohere2", "Command R7B, A", logit_scale=0.5, sliding_window=WINDOW),
    "exaone4": _row("exaone4", "EXAONE 4", **_SLIDING),
    "glm": _row("glm", "GLM-4 9B"),
    "glm4": _row("glm4", "GLM-4-0414"),
    "ernie4_5": _row("ernie4_5", "ERNIE 4.5 0.3B"),
    "helium": _row("helium", "Helium 1"),
    "hunyuan_v1_dense": _row("hunyuan_v1_dense", "Hunyuan dense"),
    "hyperclovax": _row("hyperclovax", "HyperCLOVA X"),
    "seed_oss": _row("seed_oss", "Seed-OSS", attention_bias=True, attention_dropout=0.0, residual_dropout=0.0),
    "cwm": _row(
        "cwm",
        "CWM",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"] * 2,
    ),
    "arcee": _row("arcee", "Arcee AFM"),
    "apertus": _row("apertus", "Apertus"),
    "nemotron": _row("nemotron", "Nemotron 4"),
    "starcoder2": _row("starcoder2", "StarCoder2", sliding_window=WINDOW),
    "stablelm": _row("stablelm", "StableLM 2"),
    "persimmon": _row("persimmon", "Persimmon", num_key_value_heads=2),
    "jais2": _row("jais2", "Jais 2"),
    "nanochat": _row("nanochat", "nanochat"),
    "bitnet": _row("bitnet", "BitNet b1.58"),
    "diffllama": _row("diffllama", "DiffLlama", num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "doge": _row("doge", "Doge"),
    "minicpm3": _row("minicpm3", "MiniCPM3", **_LATENT),
    "youtu": _row("youtu", "Youtu-LLM", **_LATENT),
    "hrm_text": _row("hrm_text", "HRM"),
    "gpt_neox": _row("gpt_neox", "Pythia"),
    "gpt2": _row("gpt2", "GPT-2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_bigcode": _row("gpt_bigcode", "StarCoder", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": _row("opt", "OPT", dropout=0.0, word_embed_proj_dim=64),
    "falcon": _row("falcon", "Falcon", head_dim=None),
    "bloom": _row("bloom", "BLOOM"),
    "mpt": _row("mpt", "MPT"),
    "gptj": _row("gptj", "GPT-J"),
    "lfm2": _row("lfm2", "LFM2", layer_types=["conv", "full_attention"] * 2),
    "mamba2": _row("mamba2", "Mamba 2", num_heads=4, head_dim=32),
    "recurrent_gemma": _row("recurrent_gemma", "RecurrentGemma"),
    "falcon_h1": _row("falcon_h1", "Falcon H1"),
    "qwen3_next": _row("qwen3_next", "Qwen3-Next"),
    "qwen3_5_text": _row("qwen3_5_text", "Qwen3.5"),
    "gpt_oss": _row("gpt_oss", "gpt-oss"),
    "llama4_text": _row("llama4_text", "Llama 4"),
    "qwen3_moe": _row("qwen3_moe", "Qwen3 30B-A3B", **_EXPERTS),
    "qwen2_moe": _row("qwen2_moe", "Qwen1.5-MoE", **_EXPERTS, shared_expert_intermediate_size=32),
    "mixtral": _row("mixtral", "Mixtral", **_EXPERTS),
    "olmoe": _row("olmoe", "OLMoE", **_EXPERTS),
    "granitemoe": _row("granitemoe", "Granite MoE", **_EXPERTS),
    "deepseek_v3": _row("deepseek_v3", "DeepSeek V3, Kimi K2", **_LATENT),
}
"""Name of a row -> its model."""


def family_config(family: TinyFamily) -> Any:
    """Return transformers' configuration of a tiny model."""
    settings = {**SIZES, **family.changes}
    if settings["head_dim"] is None:
        del settings["head_dim"]
    return CONFIG_MAPPING[family.model_type](**settings)


def family_module(config: Any, *, seed: int = 5) -> Any:
    """Return the FP32 module of a configuration, with random weights, norms and biases, in evaluation mode.

    Its attention is eager: that of torch's kernel, transformers' default, leaves out soft-caps.
    """
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module
