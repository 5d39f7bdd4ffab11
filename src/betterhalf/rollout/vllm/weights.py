"""Weights of vLLM under their unfused Hugging Face names: their shapes, and the values that vLLM really holds.

vLLM fuses projections (its class attribute `packed_modules_mapping` says which), shards them over ranks, pads the
vocabulary, and on a CPU replaces most by its own packed copies, which leave the parameter empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from betterhalf.rollout.vllm import experts

_EMBEDDINGS = ("VocabParallelEmbedding", "ParallelLMHead")
_COLUMNS = ("ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear")
_ROWS = ("RowParallelLinear",)
_WHOLE = ("ReplicatedLinear", "RMSNorm", "LayerNorm", "GemmaRMSNorm")
"""vLLM's layers by the sharding of their tensors: rows over ranks, fused rows over ranks, columns over ranks, whole."""


class UnknownLayer(Exception):
    """A layer with parameters whose Hugging Face names are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One Hugging Face tensor inside one of vLLM's layers."""

    name: str
    """Unfused Hugging Face name."""
    layer: Any
    """vLLM's module."""
    kind: str
    """Class name of the layer, from the lists above."""
    parameter: str
    """`weight` or `bias`."""
    start: int
    """First row in this rank's tensor."""
    rows: int
    """Rows in this rank's tensor."""
    replicas: int
    """Number of ranks that hold the same rows (key heads, when there are fewer of them than ranks)."""


def parts_of(model: Any) -> list[Part]:
    """Return every Hugging Face tensor of a vLLM model, except experts and a head tied to the embedding.

    Raises:
        UnknownLayer: a layer of an unknown class has parameters.
    """
    tied = tied_head(model)
    found: list[Part] = []
    for path, layer in model.named_modules():
        own = [name for name, value in layer._parameters.items() if value is not None]
        if own and layer is not tied and not experts.is_experts(layer):
            found += _parts_in(model, path, layer, own)
    return found


def _parts_in(model: Any, path: str, layer: Any, own: list[str]) -> list[Part]:
    kind = _kind(layer)
    if kind is None or not set(own) <= {"weight", "bias"}:
        raise UnknownLayer(
            f"the weights of {path} ({type(layer).__name__}: {', '.join(own)}) have no Hugging Face names that "
            "betterhalf knows; use a model of the Llama, Mistral, Qwen2 or Qwen3 family"
        )
    # vLLM wraps a layer that may have an adapter.
    parent, _, leaf = path.removesuffix(".base_layer").rpartition(".")
    prefix = f"{parent}." if parent else ""
    names = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    sizes = _row_counts(layer, kind, len(names))
    return [
        Part(
            name=f"{prefix}{name}.{parameter}",
            layer=layer,
            kind=kind,
            parameter=parameter,
            start=sum(sizes[:index]),
            rows=sizes[index],
            replicas=getattr(layer, "num_kv_head_replicas", 1) if index else 1,
        )
        for parameter in own
        for index, name in enumerate(names)
    ]


def _kind(layer: Any) -> str | None:
    known = (*_EMBEDDINGS, *_COLUMNS, *_ROWS, *_WHOLE)
    return next((base.__name__ for base in type(layer).__mro__ if base.__name__ in known), None)


def _row_counts(layer: Any, kind: str, count: int) -> list[int]:
    """Return the rows of each fused tensor on this rank."""
    if kind in _EMBEDDINGS:
        return [layer.num_embeddings_per_partition]
    if kind in (*_COLUMNS, *_ROWS, "ReplicatedLinear"):
        sizes = list(layer.output_partition_sizes)
        return sizes if len(sizes) == count else [sum(sizes)]
    return [int(layer.weight.shape[0])]


def expected_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return Hugging Face name -> shape of the whole tensor, over all ranks."""
    shapes = {part.name: _shape(part) for part in parts_of(model)}
    for path, layer in _expert_layers(model):
        shapes |= experts.expert_shapes(path, layer)
    return shapes


def _expert_layers(model: Any) -> list[tuple[str, Any]]:
    return [(path, layer) for path, layer in model.named_modules() if experts.is_experts(layer)]


def _shape(part: Part) -> tuple[int, ...]:
    layer = part.layer
    if part.kind in _EMBEDDINGS:
        return (layer.org_vocab_size, layer.embedding_dim)
    if part.kind in (*_COLUMNS, *_ROWS, "ReplicatedLinear"):
        ranks = layer.tp_size // part.replicas if part.kind in _COLUMNS else 1
        rows = part.rows * ranks
        return (rows, layer.input_size) if part.parameter == "weight" else (rows,)
    return tuple(getattr(layer, part.parameter).shape)


# -- reading back


@torch.no_grad()
def held(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor as the engine computes with it); all ranks gather together.

    A head tied to the embedding is left out, unless vLLM's packed copy of it differs from the embedding.
    """
    last: tuple[Any, str, Tensor] | None = None
    for part in parts_of(model):
        if last is None or last[0] is not part.layer or last[1] != part.parameter:
            last = (part.layer, part.parameter, _read(part.layer, part.parameter))
        yield part.name, _gathered(part, last[2][part.start : part.start + part.rows])
    for path, layer in _expert_layers(model):
        yield from experts.held_experts(path, layer, _of_ranks)
    head = tied_head(model)
    if head is not None and not _head_is_current(head):
        yield "lm_head.weight", _multiplied(head)


def _read(layer: Any, parameter: str) -> Tensor:
    """Return this rank's tensor: the parameter, or, if that is empty, the packed copy multiplied by the identity."""
    tensor: Tensor = getattr(layer, parameter).detach()
    if parameter == "weight" and tensor.numel() == 0:
        return _multiplied(layer)
    # Packing may widen a bias; its values stay on the grid of the weights, so narrowing is exact.
    return tensor if parameter == "weight" else tensor.to(layer.weight.dtype)


def _multiplied(layer: Any) -> Tensor:
    """Return a packed weight, [rows, columns]: each column is the product with one unit vector, a single exact term."""
    weight = layer.weight
    sizes = (getattr(layer, name, None) for name in ("input_size_per_partition", "input_size", "embedding_dim"))
    columns = next(filter(None, sizes))
    identity = torch.eye(columns, dtype=weight.dtype, device=weight.device)
    product: Tensor = layer.cpu_linear(identity, weight, None)
    return product.t().contiguous()


def _gathered(part: Part, mine: Tensor) -> Tensor:
    ranks = _over_ranks(part.layer, mine)
    if part.kind in _EMBEDDINGS:
        return torch.cat(ranks)[: part.layer.org_vocab_size]
    if part.kind in _COLUMNS:
        return torch.cat(ranks[:: part.replicas])
    if part.kind in _ROWS and part.parameter == "weight":
        return torch.cat(ranks, dim=1)
    return ranks[0]


def _over_ranks(layer: Any, mine: Tensor) -> list[Tensor]:
    """Return this tensor of every tensor-parallel rank."""
    return _of_ranks(getattr(layer, "tp_size", 1), mine)


def _of_ranks(ranks: int, mine: Tensor) -> list[Tensor]:
    if ranks == 1:
        return [mine]
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return list(group.all_gather(mine.contiguous(), dim=0).chunk(group.world_size))


# -- the tied head


def tied_head(model: Any) -> Any | None:
    """Return vLLM's module of a head that shares the embedding's weight; None without one."""
    embedding: Any | None = None
    for layer in model.modules():
        kind = _kind(layer)
        if kind == "VocabParallelEmbedding":
            embedding = embedding or layer
        elif kind == "ParallelLMHead" and embedding is not None and layer.weight is embedding.weight:
            return layer
    return None


def after_load(model: Any, names: Collection[str] | None, *, routes_in_fp32: bool) -> None:
    """Update vLLM's packed copies of weights, and FP32 routers, after a load.

    Args:
        model: vLLM's model.
        names: weights that were loaded; None for all.
        routes_in_fp32: True if the routers compute in FP32.
    """
    repack_tied_head(model)
    experts.pack(model, names)
    if routes_in_fp32:
        experts.route_in_fp32(model, _read)


def repack_tied_head(model: Any) -> None:
    """Update vLLM's packed copy of a tied head.

    A reload packs only layers whose names it receives, and a tied head has no name: on a CPU, products would keep using
    the first weights, although the parameter that the head shares is new.
    """
    head = tied_head(model)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def _head_is_current(head: Any) -> bool:
    """Return whether a packed copy equals the shared weight, compared in a few columns; True without a copy."""
    if not hasattr(head, "cpu_linear"):
        return True
    weight = head.weight
    columns = torch.linspace(0, weight.shape[1] - 1, min(8, weight.shape[1])).long()
    unit = torch.zeros(len(columns), weight.shape[1], dtype=weight.dtype, device=weight.device)
    unit[torch.arange(len(columns)), columns] = 1
    return torch.equal(head.cpu_linear(unit, weight, None).t(), weight[:, columns])


# -- for the report


def _layers(model: Any, kinds: Collection[str]) -> Iterator[Any]:
    return (layer for layer in model.modules() if _kind(layer) in kinds and getattr(layer, "weight", None) is not None)


def projection_dtype(model: Any) -> torch.dtype:
    """Return the dtype of the first projection; an emptied parameter keeps its dtype."""
    dtype: torch.dtype = next(_layers(model, (*_COLUMNS, *_ROWS))).weight.dtype
    return dtype


def norm_weight(model: Any) -> Tensor:
    """Return the weight of the first norm."""
    weight: Tensor = next(_layers(model, _WHOLE)).weight
    return weight


def rope_table(model: Any) -> Tensor | None:
    """Return the table of cosines and sines; None without one."""
    tables = (getattr(layer, "cos_sin_cache", None) for layer in model.modules())
    return next((table for table in tables if isinstance(table, Tensor)), None)


def attention_layer(vllm_config: Any) -> Any:
    """Return the first layer with a cache of keys and values."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return next(layer for layer in layers if isinstance(getattr(layer, "kv_cache", None), Tensor))


def product_names(model: Any) -> str:
    """Name the backend of the projections' products: on a CPU packed copies or torch, elsewhere vLLM's own choice."""
    layer = next(_layers(model, (*_COLUMNS, *_ROWS)))
    if not hasattr(layer, "cpu_linear"):
        return "vLLM"
    return "packed (oneDNN)" if layer.weight.numel() == 0 else "torch linear"
