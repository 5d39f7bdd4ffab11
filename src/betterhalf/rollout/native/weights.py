"""The decoder's weights: projections fused for speed, and unfused views of them under their Hugging Face names.

A view shares memory with its fused tensor, so loading through the views never moves a buffer (CUDA graphs keep their
pointers), and digests read exactly what the engine computes with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.errors import EngineError
from betterhalf.precision.formats import dtype_name
from betterhalf.precision.islands import Islands, LayerIslands, resolve_islands
from betterhalf.rollout.native.config import DecoderConfig
from betterhalf.types import DtypeName

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer. Norm weights are FP32 tensors; projections have the dtype they are multiplied in: FP32 in islands."""

    input_norm: Tensor
    """[hidden]."""
    qkv: Tensor
    """[query_size + 2 * kv_size, hidden]: queries, keys, values."""
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    """[head_dim]."""
    k_norm: Tensor | None
    """[head_dim]."""
    output: Tensor
    """[hidden, query_size]."""
    output_bias: Tensor | None
    mlp_norm: Tensor
    """[hidden]."""
    gate_up: Tensor
    """[2 * intermediate, hidden]: gate, up."""
    gate_up_bias: Tensor | None
    down: Tensor
    """[hidden, intermediate]."""
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How weights on the rollout grid are stored; a wider dtype holds the same values, ready for FP32 products."""

    grid: torch.dtype
    """Rollout dtype: what every value is rounded to on arrival."""
    linear: torch.dtype
    """dtype of the projections' tensors."""
    head: torch.dtype
    """dtype of the LM head's tensor (and of the embedding when tied)."""
    device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of zeros, of the projections' dtype unless told otherwise."""
        return torch.zeros(*shape, dtype=dtype or self.linear, device=self.device)


class DecoderWeights:
    """All weights of a decoder, zero until `load`."""

    def __init__(self, config: DecoderConfig, storage: Storage, islands: Islands | None = None) -> None:
        islands = islands or resolve_islands((), config.num_layers)
        self.storage = storage
        self.wire_dtype: torch.dtype | None = None
        """dtype of the tensors of the last `load`; None before the first."""
        self._tied = config.tied_head
        table = (config.vocab_size, config.hidden_size)
        self.embedding = storage.empty(*table, dtype=storage.head if config.tied_head else None)
        self.head = self.embedding if config.tied_head else storage.empty(*table, dtype=storage.head)
        self.norm = storage.empty(config.hidden_size, dtype=torch.float32)
        self.layers = [_empty_layer(config, storage, layer) for layer in islands.layers]
        self.views = self._name_views(config)
        """Hugging Face name -> view of the tensor as held."""

    def _name_views(self, config: DecoderConfig) -> dict[str, Tensor]:
        views = {_EMBEDDING: self.embedding}
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            views.update({prefix + name: view for name, view in _layer_views(config, layer).items()})
        views["model.norm.weight"] = self.norm
        if not config.tied_head:
            views[_HEAD] = self.head
        return views

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy every weight into place, rounded to the rollout grid. A tied head travels under the embedding's name.

        Raises:
            EngineError: an unknown, repeated or missing name, or another shape.
        """
        missing = set(self.views)
        for name, tensor in weights:
            if name == _HEAD and self._tied:
                continue
            self._check(name, tensor, missing)
            self.views[name].copy_(tensor.detach().to(self.storage.grid))
            self.wire_dtype = tensor.dtype
            missing.discard(name)
        if missing:
            raise EngineError(
                f"{len(missing)} weights did not arrive at the engine, {min(missing)!r} among them; "
                "send every weight on each sync"
            )

    def _check(self, name: str, tensor: Tensor, missing: set[str]) -> None:
        if name not in self.views:
            raise EngineError(f"the engine has no weight {name!r}; send the unfused Hugging Face names of this model")
        if name not in missing:
            raise EngineError(f"weight {name!r} arrived twice in one sync; send each name once")
        if tensor.shape != self.views[name].shape:
            raise EngineError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the engine's has {tuple(self.views[name].shape)}; "
                "load the engine from the trainer's configuration"
            )

    def why_not_finite(self) -> str:
        """For an error message: where NaN or infinity comes from, and the cure."""
        for name, view in self.views.items():
            if not bool(view.isfinite().all()):
                return (
                    f"the weight {name} holds NaN or infinity; restore the model's files, or, if it is only too "
                    "large for fp16, set precision=bf16 or precision=fp32"
                )
        return (
            "the weights are finite, so values overflow on the way; set precision=bf16 or precision=fp32, or make the "
            "modules that overflow FP32 islands with precision.fp32_modules"
        )

    def narrowed(self) -> Iterable[tuple[str, Tensor]]:
        """Each weight as held, in the rollout dtype; exact, because every value lies on that grid."""
        return ((name, view.to(self.storage.grid)) for name, view in self.views.items())

    def grid(self) -> DtypeName:
        """The format the live values really lie on: the rollout dtype, or the tensor's own if a value is off it."""
        for view in self.views.values():
            if not torch.equal(view.to(self.storage.grid).to(view.dtype), view):
                return dtype_name(view.dtype)
        return dtype_name(self.storage.grid)


def _empty_layer(config: DecoderConfig, storage: Storage, islands: LayerIslands) -> LayerWeights:
    hidden, width, wide = config.hidden_size, config.intermediate_size, torch.float32
    qkv, output, gate_up, down = (
        wide if is_island else storage.linear
        for is_island in (islands.attention, islands.output, islands.mlp, islands.down)
    )
    qkv_rows = config.query_size + 2 * config.kv_size
    return LayerWeights(
        input_norm=storage.empty(hidden, dtype=wide),
        qkv=storage.empty(qkv_rows, hidden, dtype=qkv),
        qkv_bias=storage.empty(qkv_rows, dtype=qkv) if config.qkv_bias else None,
        q_norm=storage.empty(config.head_dim, dtype=wide) if config.qk_norm else None,
        k_norm=storage.empty(config.head_dim, dtype=wide) if config.qk_norm else None,
        output=storage.empty(hidden, config.query_size, dtype=output),
        output_bias=storage.empty(hidden, dtype=output) if config.output_bias else None,
        mlp_norm=storage.empty(hidden, dtype=wide),
        gate_up=storage.empty(2 * width, hidden, dtype=gate_up),
        gate_up_bias=storage.empty(2 * width, dtype=gate_up) if config.mlp_bias else None,
        down=storage.empty(hidden, width, dtype=down),
        down_bias=storage.empty(hidden, dtype=down) if config.mlp_bias else None,
    )


def _layer_views(config: DecoderConfig, layer: LayerWeights) -> dict[str, Tensor]:
    """Names within a layer -> views; biases and head norms only where the architecture has them."""
    qkv_sizes = [config.query_size, config.kv_size, config.kv_size]
    qkv_names = [f"self_attn.{x}_proj" for x in "qkv"]
    named: dict[str, Tensor | None] = {"input_layernorm.weight": layer.input_norm}
    named |= _split("weight", layer.qkv, qkv_sizes, qkv_names)
    named |= _split("bias", layer.qkv_bias, qkv_sizes, qkv_names)
    named |= {"self_attn.o_proj.weight": layer.output, "self_attn.o_proj.bias": layer.output_bias}
    named |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm}
    named |= {"post_attention_layernorm.weight": layer.mlp_norm}
    mlp_sizes, mlp_names = [config.intermediate_size] * 2, ["mlp.gate_proj", "mlp.up_proj"]
    named |= _split("weight", layer.gate_up, mlp_sizes, mlp_names)
    named |= _split("bias", layer.gate_up_bias, mlp_sizes, mlp_names)
    named |= {"mlp.down_proj.weight": layer.down, "mlp.down_proj.bias": layer.down_bias}
    return {name: view for name, view in named.items() if view is not None}


def _split(kind: str, fused: Tensor | None, sizes: list[int], names: list[str]) -> dict[str, Tensor]:
    if fused is None:
        return {}
    return {f"{name}.{kind}": view for name, view in zip(names, torch.split(fused, sizes), strict=True)}
