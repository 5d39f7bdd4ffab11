"""Sizes and switches of a decoder of the Llama / Mistral / Qwen2 / Qwen3 family, read from transformers' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from betterhalf.errors import InputError

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` values that the native engine computes."""

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Supported rope scalings: those whose frequencies do not depend on the length of the sequence."""


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
    qkv_bias: bool
    """True if the query, key and value projections have a bias."""
    output_bias: bool
    """True if the attention's output projection has a bias."""
    mlp_bias: bool
    """True if the gate, up and down projections have a bias."""
    qk_norm: bool
    """True if each head of queries and keys is normed by RMSNorm before rope (Qwen3)."""
    tied_head: bool
    """True if the LM head shares the embedding's weight."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer: positions that a token attends to, its own included; None for all before it."""
    max_positions: int
    """Context length: prompt and completion together."""
    inv_freq: tuple[float, ...]
    """Inverse frequencies of rope, `head_dim / 2` FP32 values, exact as Python floats."""
    rope_scaling: float
    """Factor on cosine and sine (1 except for yarn)."""

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


def decoder_config(hf_config: Any) -> DecoderConfig:
    """Read a transformers configuration.

    Raises:
        InputError: the native engine does not compute the architecture, activation or rope scaling.
    """
    _require_known(hf_config)
    kind = hf_config.model_type
    heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    inv_freq, scaling = _rope(hf_config, head_dim)
    attention_bias = bool(getattr(hf_config, "attention_bias", False)) and kind in ("llama", "qwen3")
    return DecoderConfig(
        architecture=kind,
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        intermediate_size=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=hf_config.num_key_value_heads or heads,
        head_dim=head_dim,
        rms_eps=hf_config.rms_norm_eps,
        qkv_bias=attention_bias or kind == "qwen2",
        output_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(hf_config.mlp_bias),
        qk_norm=kind == "qwen3",
        tied_head=bool(hf_config.tie_word_embeddings),
        windows=_windows(hf_config),
        max_positions=hf_config.max_position_embeddings,
        inv_freq=tuple(inv_freq.tolist()),
        rope_scaling=scaling,
    )


def _require_known(hf_config: Any) -> None:
    if hf_config.model_type not in SUPPORTED_ARCHITECTURES:
        raise InputError(
            f"the native engine does not know architecture {hf_config.model_type!r}; "
            f"use a model of one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if hf_config.hidden_act != "silu":
        raise InputError(
            f"the native engine computes the activation 'silu', not {hf_config.hidden_act!r}; use a model with it"
        )


def _windows(hf_config: Any) -> tuple[int | None, ...]:
    """Return each layer's window: Mistral has one in every layer, Qwen2 and Qwen3 as `layer_types` says, Llama none."""
    layers: int = hf_config.num_hidden_layers
    window: int | None = getattr(hf_config, "sliding_window", None)
    if hf_config.model_type == "llama":
        return (None,) * layers
    if hf_config.model_type == "mistral":
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in hf_config.layer_types)


def _rope(hf_config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Return inverse frequencies (FP32, CPU) and the factor on cosine and sine, as transformers computes them."""
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise InputError(
            f"the native engine does not compute rope scaling {kind!r}; "
            f"use a model with one of {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    if inv_freq.shape[0] * 2 != head_dim:
        raise InputError(
            f"rope covers {inv_freq.shape[0] * 2} of {head_dim} dimensions of a head, which the native engine does not "
            "compute; use a model whose rope covers whole heads"
        )
    return inv_freq, float(scaling)
