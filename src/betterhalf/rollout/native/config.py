"""Sizes and switches of one decoder, read from transformers' own configuration.

Every family of `rollout.native.families` is the same decoder with other settings; no code depends on a family's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from betterhalf.errors import InputError
from betterhalf.models.blocked_attention import ScoreRule
from betterhalf.models.context import context_length
from betterhalf.models.logits import logit_transform
from betterhalf.ops import LogitTransform
from betterhalf.rollout.native.families import FAMILIES, Activation, Family, HeadNorm, LayerNorms, NormKind
from betterhalf.rollout.native.mixture import Mixture, read_mixture

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
"""`model_type` values that the native engine computes."""

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Supported rope scalings: within `context_length`, their frequencies do not depend on the length of the sequence."""

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' name of an activation -> the engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Frequencies of one kind of layer."""

    inv_freq: tuple[float, ...]
    """Inverse frequencies, FP32 values, exact as Python floats; half as many as the dimensions that are rotated."""
    scaling: float
    """Factor on cosine and sine (1 except for yarn and longrope)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of one decoder."""

    architecture: str
    """transformers `model_type`."""
    vocab_size: int
    """Tokens in the vocabulary."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the MLP."""
    num_layers: int
    """Number of layers."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of key heads, and of value heads; divides `num_heads`."""
    head_dim: int
    """Width of one head."""
    rms_eps: float
    """Added to the mean square in every RMSNorm."""
    norm_kind: NormKind
    """Rounding points and weight of every RMSNorm."""
    norms: LayerNorms
    """RMSNorms of a layer."""
    head_norm: HeadNorm | None
    """RMSNorm of queries and keys before rope; None without one."""
    qkv_bias: bool
    """True if the query, key and value projections have a bias."""
    output_bias: bool
    """True if the attention's output projection has a bias."""
    mlp_bias: bool
    """True if the gate, up and down projections have a bias."""
    fused_names: bool
    """True if files hold queries, keys and values as one weight, and gate and up as one (Phi-3)."""
    activation: Activation
    """Function of the gate in the MLP."""
    embedding_scale: float
    """Factor of the embedding."""
    rounds_embedding_scale: bool
    """True if that factor is rounded to the rollout dtype first."""
    residual_scale: float
    """Factor of each branch that is added to the residual stream."""
    attention_scale: float
    """Factor of the attention's scores."""
    attention_cap: float | None
    """Soft-cap of the attention's scores; None without one."""
    logits: LogitTransform
    """Function that follows the LM head."""
    tied_head: bool
    """True if the LM head shares the embedding's weight."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer: positions that a token attends to, its own included; None for all before it."""
    max_positions: int
    """Context length: prompt and completion together."""
    ropes: tuple[Rope, ...]
    """Different ropes of the layers."""
    layer_ropes: tuple[int | None, ...]
    """Index in `ropes` for each layer; None for a layer without positions."""
    rope_in_fp32: bool
    """True if the trainer rotates in FP32 and rounds once (OLMo 2)."""
    mixture: Mixture | None
    """Experts; None without any."""

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Number of query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    def score_rule(self, layer: int) -> ScoreRule:
        """Return scale, sliding window and soft-cap of a layer's attention scores."""
        return ScoreRule(scale=self.attention_scale, window=self.windows[layer], cap=self.attention_cap)

    @property
    def has_kernels(self) -> bool:
        """True if the fused kernels of a GPU compute it: the block of Llama and Qwen3."""
        return (
            self.norms == LayerNorms()
            and self.norm_kind == "llama"
            and self.head_norm != "row"
            and self.activation == "silu"
            and self.residual_scale == 1.0
            and not self.rope_in_fp32
            and set(self.layer_ropes) == {0}
            and 2 * len(self.ropes[0].inv_freq) == self.head_dim
        )


def decoder_config(hf_config: Any) -> DecoderConfig:
    """Read a transformers configuration.

    Raises:
        InputError: the native engine does not compute the architecture, activation or rope scaling.
    """
    family = _known(hf_config)
    heads, head_dim = hf_config.num_attention_heads, _head_dim(hf_config)
    ropes, layer_ropes = _ropes(hf_config, family, head_dim)
    attention_bias, output_bias, mlp_bias = (bool(key and getattr(hf_config, key)) for key in family.biases)
    return DecoderConfig(
        architecture=hf_config.model_type,
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        intermediate_size=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=hf_config.num_key_value_heads or heads,
        head_dim=head_dim,
        rms_eps=hf_config.rms_norm_eps,
        norm_kind=family.norm_kind,
        norms=family.norms,
        head_norm=family.head_norm,
        qkv_bias=attention_bias or family.always_qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        fused_names=family.fused_names,
        activation=_activation(hf_config, family),
        embedding_scale=_embedding_scale(hf_config, family),
        rounds_embedding_scale=family.embedding_scale == "sqrt_hidden",
        residual_scale=float(getattr(hf_config, family.residual_scale) if family.residual_scale else 1.0),
        attention_scale=_attention_scale(hf_config, family, head_dim),
        attention_cap=getattr(hf_config, family.attention_cap) if family.attention_cap else None,
        logits=logit_transform(hf_config),
        tied_head=bool(hf_config.tie_word_embeddings),
        windows=_windows(hf_config, family),
        max_positions=context_length(hf_config),
        ropes=ropes,
        layer_ropes=layer_ropes,
        rope_in_fp32=family.rope_in_fp32,
        mixture=read_mixture(hf_config) if family.experts else None,
    )


def _known(hf_config: Any) -> Family:
    if hf_config.model_type not in FAMILIES:
        raise InputError(
            f"the native engine does not know architecture {hf_config.model_type!r}; "
            f"use a model of one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return FAMILIES[hf_config.model_type]


def _activation(hf_config: Any, family: Family) -> Activation:
    name = getattr(hf_config, family.activation)
    if name not in _ACTIVATIONS:
        raise InputError(
            f"the native engine computes the activations {' and '.join(_ACTIVATIONS)}, not {name!r}; use a model with "
            "one of them, or set engine=vllm"
        )
    return _ACTIVATIONS[name]


def _head_dim(hf_config: Any) -> int:
    return int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads)


def _embedding_scale(hf_config: Any, family: Family) -> float:
    if family.embedding_scale == "sqrt_hidden":
        return float(hf_config.hidden_size**0.5)
    return 1.0 if family.embedding_scale is None else float(getattr(hf_config, family.embedding_scale))


def _attention_scale(hf_config: Any, family: Family, head_dim: int) -> float:
    if family.attention_scale == "query_pre_attn_scalar":
        return float(hf_config.query_pre_attn_scalar**-0.5)
    return (
        float(head_dim**-0.5) if family.attention_scale is None else float(getattr(hf_config, family.attention_scale))
    )


def _windows(hf_config: Any, family: Family) -> tuple[int | None, ...]:
    """Return each layer's sliding window: none, the same in every layer, or as `layer_types` says."""
    layers: int = hf_config.num_hidden_layers
    if family.windows == "none":
        return (None,) * layers
    window: int | None = hf_config.sliding_window
    if family.windows == "all":
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in hf_config.layer_types)


# -- rope


def _ropes(hf_config: Any, family: Family, head_dim: int) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """Return the different ropes, and the index of each layer's rope; None for a layer without one."""
    layers, parameters = hf_config.num_hidden_layers, hf_config.rope_parameters
    by_type = all(isinstance(value, dict) for value in parameters.values())
    kinds = list(hf_config.layer_types) if by_type else [None] * layers
    found = {kind: _rope(hf_config, head_dim, kind) for kind in dict.fromkeys(kinds)}
    ropes = tuple(dict.fromkeys(found.values()))
    used = family.uses_rope(hf_config)
    return ropes, tuple(ropes.index(found[kind]) if use else None for kind, use in zip(kinds, used, strict=True))


def _rope(hf_config: Any, head_dim: int, layer_type: str | None) -> Rope:
    parameters = hf_config.rope_parameters if layer_type is None else hf_config.rope_parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise InputError(
            f"the native engine does not compute rope scaling {kind!r}; "
            f"use a model with one of {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    inv_freq, scaling = _frequencies(hf_config, parameters, kind, head_dim, layer_type)
    return Rope(inv_freq=tuple(inv_freq.tolist()), scaling=float(scaling))


def _frequencies(
    hf_config: Any, parameters: Any, kind: str, head_dim: int, layer_type: str | None
) -> tuple[Tensor, float]:
    """Return inverse frequencies (FP32, CPU) and the factor on cosine and sine, as transformers computes them."""
    if kind == "default":
        width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    which = {} if layer_type is None else {"layer_type": layer_type}
    return ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"), **which)
