"""FP32 islands: modules that compute in FP32 while the rest of the model is half.

An island widens its input, computes in FP32 and returns FP32: rounded to half, its result would overflow after all.
The residual stream that it adds to is therefore FP32 from there to the end of the model. Norms compute in FP32 anyway;
where a norm of an FP32 stream feeds a half module, its result is rounded once. Trainer and engine are both built from
the same `Islands`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from betterhalf.errors import InputError

_PARTS = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
"""Modules within a layer that can be islands, besides the whole layer. Projections that read a norm's result cannot be
islands alone: their result would overflow in the half module that reads it."""

_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Norms of a branch's result, just before it is added to the residual stream, in blocks that have them."""

_FOUR_NORMS = ("gemma2", "gemma3_text")
"""transformers `model_type` of decoders whose blocks have norms before and after attention and MLP."""

NONE = "none"
"""Report of a side without islands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerIslands:
    """Parts of one layer in the order of computation; True for those in FP32."""

    stream_in: bool
    """Residual stream that the attention's norm reads."""
    attention: bool
    """Queries, keys, values (with their norms and rope) and the attention itself."""
    output: bool
    """Output projection of the attention."""
    attention_norm: bool
    """Norm of the attention's result; where a block has none, the result itself."""
    stream_mid: bool
    """Residual stream that the MLP's norm reads."""
    mlp: bool
    """Gate and up projections and their product."""
    down: bool
    """Down projection."""
    mlp_norm: bool
    """Norm of the MLP's result; where a block has none, the result itself."""
    stream_out: bool
    """Residual stream that the next layer, or the final norm, reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Islands:
    """FP32 islands of one model."""

    names: tuple[str, ...]
    """Names of the modules, in the model's order; none is inside another."""
    layers: tuple[LayerIslands, ...]
    """FP32 parts of each layer that follow from the names."""

    def __bool__(self) -> bool:
        """Return whether there is any island."""
        return bool(self.names)

    def hold(self, parameter: str) -> bool:
        """Return whether the parameter with this unfused Hugging Face name belongs to an island."""
        return any(parameter.startswith(f"{name}.") for name in self.names)

    @property
    def stream_out(self) -> bool:
        """True if the final norm reads an FP32 stream."""
        return bool(self.layers) and self.layers[-1].stream_out

    @property
    def attention(self) -> bool:
        """True if the attention of any layer is FP32."""
        return any(layer.attention for layer in self.layers)

    def described(self) -> str:
        """Return the names, or `none`, for the contract."""
        return ", ".join(self.names) or NONE


NO_ISLANDS = Islands(names=(), layers=())
"""A model that computes in one dtype."""


def has_post_norms(hf_config: Any) -> bool:
    """Return whether the blocks of a model, by its transformers configuration, have norms that can be islands alone."""
    return hf_config.model_type in _FOUR_NORMS


def resolve_islands(patterns: Sequence[str], num_layers: int, *, post_norms: bool = False) -> Islands:
    """Return the islands of a model that match the patterns of `precision.fp32_modules`.

    Args:
        patterns: module names, or shell patterns of them (`*` also matches dots).
        num_layers: number of decoder layers of the model.
        post_norms: `has_post_norms` of the model.

    Raises:
        InputError: a pattern matches no module that can be an island; the message suggests the closest name.
    """
    parts = (*_PARTS, *_POST_NORMS) if post_norms else _PARTS
    allowed = tuple(_allowed(num_layers, parts))
    for pattern in patterns:
        _require_match(pattern, allowed, num_layers, parts)
    chosen = {name for name in allowed if any(fnmatchcase(name, pattern) for pattern in patterns)}
    names = tuple(name for name in allowed if name in chosen and not _inside_another(name, chosen))
    return Islands(names=names, layers=tuple(_layers(frozenset(names), num_layers)))


def _allowed(num_layers: int, parts: tuple[str, ...]) -> Iterator[str]:
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield prefix
        yield from (f"{prefix}.{part}" for part in parts)


def _require_match(pattern: str, allowed: tuple[str, ...], num_layers: int, parts: tuple[str, ...]) -> None:
    if any(fnmatchcase(name, pattern) for name in allowed):
        return
    near = difflib.get_close_matches(pattern, allowed, n=1, cutoff=0.7)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"precision.fp32_modules names {pattern!r}, which matches no module that can be an FP32 island in this model "
        f"of {num_layers} layers; use model.layers.N, alone or followed by one of "
        f"{', '.join(f'.{part}' for part in parts)}, with * in place of N for every layer{meant}"
    )


def _inside_another(name: str, chosen: set[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in chosen)


def _layers(names: frozenset[str], num_layers: int) -> Iterator[LayerIslands]:
    """Yield the FP32 parts of each layer; once the residual stream is FP32, it stays FP32."""
    stream = False
    for index in range(num_layers):
        layer = _layer(names, f"model.layers.{index}", stream)
        stream = layer.stream_out
        yield layer


def _layer(names: frozenset[str], prefix: str, stream: bool) -> LayerIslands:
    whole = prefix in names
    attention = whole or f"{prefix}.self_attn" in names
    output = attention or f"{prefix}.self_attn.o_proj" in names
    mlp = whole or f"{prefix}.mlp" in names
    down = mlp or f"{prefix}.mlp.down_proj" in names
    stream_in = stream or whole
    attention_norm = output or f"{prefix}.{_POST_NORMS[0]}" in names
    mlp_norm = down or f"{prefix}.{_POST_NORMS[1]}" in names
    stream_mid = stream_in or attention_norm
    return LayerIslands(
        stream_in=stream_in,
        attention=attention,
        output=output,
        attention_norm=attention_norm,
        stream_mid=stream_mid,
        mlp=mlp,
        down=down,
        mlp_norm=mlp_norm,
        stream_out=stream_mid or mlp_norm,
    )
