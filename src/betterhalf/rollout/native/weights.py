"""The decoder's weights: projections are fused for speed, and addressed by their unfused Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from betterhalf.config.schema import LoraConfig
from betterhalf.errors import EngineError
from betterhalf.precision.emulation import to_format
from betterhalf.precision.formats import dtype_name, held_format, is_on_grid, torch_dtype
from betterhalf.precision.islands import Islands, LayerIslands, resolve_islands
from betterhalf.rollout.native.config import DecoderConfig
from betterhalf.rollout.native.fused_parameter import FusedParameter, Operand
from betterhalf.rollout.native.mixture import ExpertWeights, expert_operands, expert_parameters
from betterhalf.rollout.weight_arrivals import WeightArrivals
from betterhalf.types import DtypeName

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Weights of one layer.

    Norm weights are FP32. Projections have the dtype of their products, FP32 in islands, and are packed on a CPU
    (`precision.products`). Biases have the dtype of their projection.
    """

    input_norm: Tensor | None
    """Norm before attention [hidden]; None without one, here as below."""
    qkv: Operand
    """Query, key and value projections [query_size + 2 * kv_size, hidden]."""
    qkv_bias: Tensor | None
    """Bias of `qkv` [query_size + 2 * kv_size]."""
    q_norm: Tensor | None
    """Norm of each query head [head_dim], or of all of them [query_size]."""
    k_norm: Tensor | None
    """Norm of each key head [head_dim], or of all of them [kv_size]."""
    output: Operand
    """Output projection of attention [hidden, query_size]."""
    output_bias: Tensor | None
    """Bias of `output` [hidden]."""
    attention_norm: Tensor | None
    """Norm of attention's result [hidden]."""
    mlp_norm: Tensor | None
    """Norm before the MLP [hidden]."""
    experts: ExpertWeights | None
    """Router and experts; None in a layer with an ordinary MLP."""
    gate_up: Operand
    """Gate and up projections [2 * intermediate, hidden]."""
    gate_up_bias: Tensor | None
    """Bias of `gate_up` [2 * intermediate]."""
    down: Operand
    """Down projection [hidden, intermediate]."""
    down_bias: Tensor | None
    """Bias of `down` [hidden]."""
    down_norm: Tensor | None
    """Norm of the MLP's result [hidden]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Storage dtypes of weights on the rollout grid; a wider dtype holds the same values, ready for FP32 products."""

    format: DtypeName
    """Rollout dtype, to which every value is rounded on arrival."""
    wire: DtypeName
    """Format in which weights are sent."""
    linear: torch.dtype
    """dtype of the projections' tensors."""
    head: torch.dtype
    """dtype of the LM head's tensor (and of the embedding when tied)."""
    device: torch.device
    """Device of all tensors."""
    apart: bool = False
    """True if the parameters of a fused projection are multiplied one by one."""

    @property
    def grid(self) -> torch.dtype:
        """torch dtype of `format`."""
        return torch_dtype(self.format)

    @property
    def packs(self) -> bool:
        """True if right sides of products are packed; a tied head is then a tensor separate from the embedding."""
        return self.device.type == "cpu"

    def plain(self, name: str, rows: int, width: int | None, dtype: torch.dtype) -> FusedParameter:
        """Allocate one parameter with ordinary strides."""
        return FusedParameter({name: rows}, width, dtype=dtype, device=self.device, packs=False)

    def matrix(self, parts: Mapping[str, int], width: int, dtype: torch.dtype) -> FusedParameter:
        """Allocate concatenated matrices that are the right side of one product."""
        return FusedParameter(parts, width, dtype=dtype, device=self.device, packs=self.packs, apart=self.apart)

    def experts(self, parts: Mapping[str, int], width: int, dtype: torch.dtype) -> FusedParameter:
        """Allocate matrices of an expert, or of a router, which are never multiplied one by one."""
        return FusedParameter(parts, width, dtype=dtype, device=self.device, packs=self.packs)

    def bias(self, parts: Mapping[str, int], dtype: torch.dtype) -> FusedParameter:
        """Allocate concatenated biases."""
        return FusedParameter(parts, None, dtype=dtype, device=self.device, packs=False)


class DecoderWeights:
    """All weights of a decoder, zero until `load`."""

    def __init__(
        self,
        config: DecoderConfig,
        storage: Storage,
        islands: Islands | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        islands = islands or resolve_islands((), config.num_layers)
        self.storage = storage
        self.wire_format = storage.wire
        """Format of the values in the last `load`; before the first, the one that is expected."""
        vocabulary, hidden = config.vocab_size, config.hidden_size
        self._shares = config.tied_head and not storage.packs
        self._table = storage.plain(_EMBEDDING, vocabulary, hidden, storage.head if self._shares else storage.grid)
        head = {_EMBEDDING if config.tied_head else _HEAD: vocabulary}
        self._head = self._table if self._shares else storage.matrix(head, hidden, storage.head)
        self._norm = storage.plain(_NORM, hidden, None, torch.float32)
        self._layers = [_layer_parameters(config, storage, index, layer) for index, layer in enumerate(islands.layers)]
        between = [parameter for layer in self._layers for parameter in layer.values()]
        for parameter in between if lora else ():
            assert lora is not None
            parameter.adapt(lora)
        self._parameters = [self._table, *between, self._norm, *([] if self._shares else [self._head])]
        self._publish()

    def _publish(self) -> None:
        """Expose the current tensors to the decoder."""
        self.embedding = self._table.tensor
        self.head = self._head.tensor
        self.norm = self._norm.tensor
        self.layers = [_layer_weights(layer) for layer in self._layers]

    @property
    def _tied(self) -> bool:
        return self._head.names == (_EMBEDDING,)

    def _holders(self) -> dict[str, list[FusedParameter]]:
        """Return name -> the fused parameters that hold it: two for a tied embedding whose head is packed."""
        holders: dict[str, list[FusedParameter]] = {}
        for parameter in self._parameters:
            for name in parameter.names:
                holders.setdefault(name, []).append(parameter)
        return holders

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]], *, held: bool = False) -> None:
        """Write every weight, rounded to the rollout grid. A tied head arrives under the embedding's name.

        Args:
            weights: (unfused Hugging Face name, whole tensor), each name once.
            held: True if weights may be left out, which then keep their values.

        Raises:
            EngineError: a name is unknown, repeated or missing, or a tensor has the wrong shape.
        """
        holders = self._holders()
        shapes = {name: found[0].shape(name) for name, found in holders.items()}
        arrivals = WeightArrivals(shapes, held=held)
        for parameter in self._parameters:
            parameter.begin()
        arrived: set[DtypeName] = set()
        for name, tensor in weights:
            if name == _HEAD and self._tied:
                continue
            arrivals.check(name, tensor)
            on_grid = to_format(tensor.detach(), self.storage.format)
            for parameter in holders[name]:
                parameter.write(name, on_grid)
            arrived.add(held_format(tensor, self.storage.wire))
        arrivals.finish()
        for parameter in self._parameters:
            parameter.finish()
        self.wire_format = next((name for name in arrived if name != self.storage.wire), self.storage.wire)
        self._publish()

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) of each weight once, as the decoder computes with it.

        Raises:
            EngineError: a tied head and the embedding differ.
        """
        tied = self._tied and not self._shares
        for parameter in self._parameters[:-1] if tied else self._parameters:
            yield from parameter.read()
        if tied and not _same_bits(dict(self._head.read())[_EMBEDDING].to(self.storage.grid), self.embedding):
            raise EngineError("the engine's tied head and its embedding differ; send every weight on each sync")

    def projections(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Return (names of the parameters that share a product, its right side) of the layers' linear operations."""
        held = (operand for layer in self._layers for parameter in layer.values() for operand in parameter.operands)
        return ((names, operand) for names, operand in held if operand.dim() > 1)

    def why_not_finite(self) -> str:
        """Explain in an error message where NaN or infinity comes from, and name the fix."""
        for name, tensor in self.held():
            if not bool(tensor.isfinite().all()):
                return (
                    f"the weight {name} holds NaN or infinity; restore the model's files, or lower "
                    "optimizer.learning_rate if training caused it, or, if it is only too large for fp16, set "
                    "precision=bf16 or precision=fp32"
                )
        return (
            "the weights are finite, so values overflow in the forward pass; set precision=bf16 or precision=fp32, or "
            "make the modules that overflow FP32 islands with precision.fp32_modules"
        )

    def narrowed(self) -> Iterator[tuple[str, Tensor]]:
        """Return (name, values) of each weight in the rollout dtype; exact, because every value is on that grid."""
        return ((name, tensor.to(self.storage.grid)) for name, tensor in self.held())

    def grid(self) -> DtypeName:
        """Return the format of the live values: the rollout dtype, or a tensor's dtype if some are off the grid."""
        for _, tensor in self.held():
            if not is_on_grid(tensor, self.storage.format):
                return dtype_name(tensor.dtype)
        return self.storage.format


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether all bits are equal, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _layer_parameters(
    config: DecoderConfig, storage: Storage, index: int, islands: LayerIslands
) -> dict[str, FusedParameter]:
    """Return field of `LayerWeights` -> its fused parameter, in the module's order, without those that the
    architecture lacks."""
    prefix = f"model.layers.{index}."
    hidden, wide = config.hidden_size, torch.float32
    qkv, gate_up = _fused_rows(config, prefix)
    output, down = {f"{prefix}self_attn.o_proj": hidden}, {f"{prefix}mlp.down_proj": hidden}
    projections = [
        ("qkv", qkv, hidden, islands.attention, config.qkv_bias),
        ("output", output, config.query_size, islands.output, config.output_bias),
        ("gate_up", gate_up, hidden, islands.mlp, config.mlp_bias),
        ("down", down, config.intermediate_size, islands.down, config.mlp_bias),
    ]
    parameters: dict[str, FusedParameter] = {}
    if config.mixture is not None and config.mixture.layers[index] is not None:
        projections = projections[:2]
        experts = partial(storage.experts, dtype=wide if islands.mlp else storage.linear)
        router = partial(storage.experts, dtype=wide)
        parameters = expert_parameters(config.mixture, f"{prefix}mlp.", hidden, experts, router)
    for field, parts, width, island, has_bias in projections:
        dtype = wide if island else storage.linear
        parameters[field] = storage.matrix({f"{name}.weight": rows for name, rows in parts.items()}, width, dtype)
        if has_bias:
            parameters[f"{field}_bias"] = storage.bias({f"{name}.bias": rows for name, rows in parts.items()}, dtype)
    for field, name, width in _norm_widths(config):
        parameters[field] = storage.plain(f"{prefix}{name}.weight", width, None, wide)
    return parameters


def _fused_rows(config: DecoderConfig, prefix: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return name -> rows of the parameters of queries, keys and values, and of those of gate and up."""
    if config.fused_names:
        qkv = {f"{prefix}self_attn.qkv_proj": config.query_size + 2 * config.kv_size}
        return qkv, {f"{prefix}mlp.gate_up_proj": 2 * config.intermediate_size}
    rows = zip("qkv", (config.query_size, config.kv_size, config.kv_size), strict=True)
    gate_up = {f"{prefix}mlp.{x}_proj": config.intermediate_size for x in ("gate", "up")}
    return {f"{prefix}self_attn.{x}_proj": count for x, count in rows}, gate_up


def _norm_widths(config: DecoderConfig) -> Iterator[tuple[str, str, int]]:
    """Yield (field of `LayerWeights`, name in the layer, width) of a layer's norms."""
    norms, hidden = config.norms, config.hidden_size
    places = {
        "input_norm": norms.before_attention,
        "attention_norm": norms.after_attention,
        "mlp_norm": norms.before_mlp,
        "down_norm": norms.after_mlp,
    }
    yield from ((field, name, hidden) for field, name in places.items() if name is not None)
    if config.head_norm is not None:
        each = config.head_norm == "head"
        yield "q_norm", "self_attn.q_norm", config.head_dim if each else config.query_size
        yield "k_norm", "self_attn.k_norm", config.head_dim if each else config.kv_size


def _layer_weights(parameters: Mapping[str, FusedParameter]) -> LayerWeights:
    held = {name: parameter.operand for name, parameter in parameters.items()}
    plain = {field.name: held.get(field.name) for field in fields(LayerWeights) if field.name != "experts"}
    return LayerWeights(**plain, experts=expert_operands(held))  # type: ignore[arg-type]
