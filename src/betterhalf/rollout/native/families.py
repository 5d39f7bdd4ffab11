"""Families of decoders that the native engine computes: how each differs from Llama."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

NormKind = Literal["llama", "once", "one_plus"]
"""RMSNorm of the trainer: `llama` rounds before and after the weight is applied; `once` rounds only after it (OLMo 2);
`one_plus` rounds like `once`, and adds 1 to the weight (Gemma)."""

HeadNorm = Literal["head", "row"]
"""RMSNorm of each head of queries and keys (Qwen3), or of all heads of a token together (OLMo 2)."""

Activation = Literal["silu", "gelu_tanh"]
"""Function of the gate: SiLU, or GELU by its tanh approximation."""

Windows = Literal["none", "all", "layer_types"]
"""Layers with sliding-window attention: none, all, or those of `layer_types`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """Names of a layer's RMSNorms in the files, by their place; None for a place without one. Defaults: Llama's."""

    before_attention: str | None = "input_layernorm"
    """Norm of the residual stream that attention reads."""
    after_attention: str | None = None
    """Norm of attention's result, before it is added to the residual stream."""
    before_mlp: str | None = "post_attention_layernorm"
    """Norm of the residual stream that the MLP reads."""
    after_mlp: str | None = None
    """Norm of the MLP's result."""


def _everywhere(hf_config: Any) -> list[bool]:
    return [True] * hf_config.num_hidden_layers


def _where_listed(hf_config: Any) -> list[bool]:
    return [bool(used) for used in hf_config.no_rope_layers]


def _where_sliding(hf_config: Any) -> list[bool]:
    return [hf_config.sliding_window is None or kind == "sliding_attention" for kind in hf_config.layer_types]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Differences from Llama; strings are keys of the transformers configuration."""

    biases: tuple[str | None, str | None, str | None] = (None, None, None)
    """Keys that give a bias to queries, keys and values, to attention's output, and to the MLP; None for never."""
    always_qkv_bias: bool = False
    """True if queries, keys and values always have a bias."""
    norm_kind: NormKind = "llama"
    """Kind of every RMSNorm."""
    norms: LayerNorms = LayerNorms()
    """RMSNorms of a layer."""
    head_norm: HeadNorm | None = None
    """RMSNorm of queries and keys."""
    fused_names: bool = False
    """True if files hold fused projections."""
    activation: str = "hidden_act"
    """Key of the activation."""
    embedding_scale: str | None = None
    """Key of the embedding's factor, or `sqrt_hidden` for the square root of the hidden size, rounded to the rollout
    dtype."""
    residual_scale: str | None = None
    """Key of the factor of each branch."""
    attention_scale: str | None = None
    """Key of the scores' factor; `query_pre_attn_scalar` stands for its inverse square root. None for that of the
    head's width."""
    attention_cap: str | None = None
    """Key of the scores' soft-cap; None without one."""
    windows: Windows = "none"
    """Layers with sliding-window attention."""
    uses_rope: Callable[[Any], Sequence[bool]] = _everywhere
    """(transformers configuration) -> True for each layer with rope."""
    experts: bool = False
    """True if layers have experts in place of an MLP."""
    rope_in_fp32: bool = False
    """True if queries and keys are rotated in FP32, by unrounded tables, and rounded once."""


_ATTENTION_BIAS = ("attention_bias", "attention_bias", None)
_ALL_BIASES = ("attention_bias", "attention_bias", "mlp_bias")
_AFTER = LayerNorms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
_BEFORE_AND_AFTER = LayerNorms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(biases=_ALL_BIASES),
    "mistral": Family(windows="all"),
    "ministral": Family(windows="layer_types"),
    "qwen2": Family(always_qkv_bias=True, windows="layer_types"),
    "qwen3": Family(biases=_ATTENTION_BIAS, head_norm="head", windows="layer_types"),
    "qwen3_moe": Family(biases=_ATTENTION_BIAS, head_norm="head", windows="all", experts=True),
    "gemma": Family(biases=_ATTENTION_BIAS, norm_kind="one_plus", embedding_scale="sqrt_hidden"),
    "gemma2": Family(
        biases=_ATTENTION_BIAS,
        norm_kind="one_plus",
        norms=_BEFORE_AND_AFTER,
        activation="hidden_activation",
        embedding_scale="sqrt_hidden",
        attention_scale="query_pre_attn_scalar",
        attention_cap="attn_logit_softcapping",
        windows="layer_types",
    ),
    "vaultgemma": Family(
        biases=_ATTENTION_BIAS,
        norm_kind="one_plus",
        norms=LayerNorms(before_mlp="pre_feedforward_layernorm"),
        activation="hidden_activation",
        embedding_scale="sqrt_hidden",
        attention_scale="query_pre_attn_scalar",
        attention_cap="attn_logit_softcapping",
        windows="layer_types",
    ),
    "gemma3_text": Family(
        biases=_ATTENTION_BIAS,
        norm_kind="one_plus",
        norms=_BEFORE_AND_AFTER,
        head_norm="head",
        activation="hidden_activation",
        embedding_scale="sqrt_hidden",
        attention_scale="query_pre_attn_scalar",
        windows="layer_types",
    ),
    "phi3": Family(fused_names=True, windows="all"),
    "olmo2": Family(biases=_ATTENTION_BIAS, norm_kind="once", norms=_AFTER, head_norm="row", rope_in_fp32=True),
    "olmo3": Family(
        biases=_ATTENTION_BIAS,
        norm_kind="once",
        norms=_AFTER,
        head_norm="row",
        windows="layer_types",
        rope_in_fp32=True,
    ),
    "smollm3": Family(biases=_ALL_BIASES, windows="layer_types", uses_rope=_where_listed),
    "granite": Family(
        biases=_ALL_BIASES,
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        attention_scale="attention_multiplier",
    ),
    "exaone4": Family(norms=_AFTER, head_norm="head", windows="layer_types", uses_rope=_where_sliding),
    "seed_oss": Family(biases=("attention_bias", "attention_out_bias", "mlp_bias")),
    "cwm": Family(biases=(None, None, "mlp_bias"), windows="layer_types"),
}
"""transformers `model_type` -> family."""
