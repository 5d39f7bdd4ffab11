"""FP32 islands: which modules compute in FP32 although the rest of the model is half, and what that makes of the rest.

An island computes in FP32 from its input on and hands on FP32; a result rounded to half would overflow after all. The
residual stream it adds to is therefore FP32 from there to the end of the model. Norms compute in FP32 anyway; what a
norm of a wide stream hands to a half module is rounded once. Both wings build from the same `Islands`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from betterhalf.errors import InputError

_PARTS = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
"""What can be an island within a layer, apart from the whole layer. Projections that read a norm's result are not
islands by themselves: what overflows there is the half module behind them."""

NONE = "none"
"""What a side without islands reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerIslands:
    """What is FP32 in one layer, in the order of computation."""

    stream_in: bool
    """The residual stream that the attention's norm reads."""
    attention: bool
    """Queries, keys, values (with their norms and rope) and the attention itself."""
    output: bool
    """The attention's output projection."""
    stream_mid: bool
    """The residual stream that the MLP's norm reads."""
    mlp: bool
    """Gate and up projections and their product."""
    down: bool
    """The down projection."""
    stream_out: bool
    """The residual stream that the next layer, or the final norm, reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Islands:
    """The FP32 islands of one model."""

    names: tuple[str, ...]
    """Modules, in the model's order; none lies within another."""
    layers: tuple[LayerIslands, ...]
    """What that makes FP32 in each layer."""

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.names)

    def hold(self, parameter: str) -> bool:
        """Whether the parameter of this unfused Hugging Face name belongs to an island."""
        return any(parameter.startswith(f"{name}.") for name in self.names)

    @property
    def stream_out(self) -> bool:
        """Whether the final norm reads an FP32 stream."""
        return bool(self.layers) and self.layers[-1].stream_out

    @property
    def attention(self) -> bool:
        """Whether any layer's attention is FP32."""
        return any(layer.attention for layer in self.layers)

    def described(self) -> str:
        """For the contract: the names, or `none`."""
        return ", ".join(self.names) or NONE


def resolve_islands(patterns: Sequence[str], num_layers: int) -> Islands:
    """The islands that `precision.fp32_modules` names in a model of so many layers.

    Args:
        patterns: module names or shell patterns of them (`*` also matches dots).
        num_layers: decoder layers of the model.

    Raises:
        InputError: a pattern matches no module that can be an island; the message names the nearest that can.
    """
    allowed = tuple(_allowed(num_layers))
    for pattern in patterns:
        _require_match(pattern, allowed, num_layers)
    chosen = {name for name in allowed if any(fnmatchcase(name, pattern) for pattern in patterns)}
    names = tuple(name for name in allowed if name in chosen and not _inside_another(name, chosen))
    return Islands(names=names, layers=tuple(_layers(frozenset(names), num_layers)))


def _allowed(num_layers: int) -> Iterator[str]:
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield prefix
        yield from (f"{prefix}.{part}" for part in _PARTS)


def _require_match(pattern: str, allowed: tuple[str, ...], num_layers: int) -> None:
    if any(fnmatchcase(name, pattern) for name in allowed):
        return
    near = difflib.get_close_matches(pattern, allowed, n=1, cutoff=0.7)
    meant = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"precision.fp32_modules names {pattern!r}, which is no module of this model of {num_layers} layers that can "
        f"be an FP32 island; {meant}Use model.layers.N, or model.layers.N with one of "
        f"{', '.join(f'.{part}' for part in _PARTS)} behind it; * in the place of N takes every layer."
    )


def _inside_another(name: str, chosen: set[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in chosen)


def _layers(names: frozenset[str], num_layers: int) -> Iterator[LayerIslands]:
    """Layer by layer; a stream that is FP32 once stays so."""
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
    stream_mid = stream_in or output
    return LayerIslands(
        stream_in=stream_in,
        attention=attention,
        output=output,
        stream_mid=stream_mid,
        mlp=mlp,
        down=down,
        stream_out=stream_mid or down,
    )
