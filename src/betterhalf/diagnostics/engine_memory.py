"""Memory of one rollout engine, item by item. The letters are those of `trainer_memory`."""

from __future__ import annotations

from betterhalf.config.engine import CacheReservation
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.sizes import GIB, Machine, MemoryItem, ModelSizes, StepSizes, count, item_size
from betterhalf.diagnostics.trainer_memory import widens

_LENGTH_MULTIPLE = 16
"""The native engine rounds the length of its KV cache up to a multiple of this."""

_LOGITS = 3
"""Tensors [sequences, V] in FP32 at once while the native engine draws tokens."""


def engine_items(config: RunConfig, sizes: ModelSizes, step: StepSizes, machine: Machine) -> tuple[MemoryItem, ...]:
    """Return the memory of one engine; for vLLM on several GPUs, of its share of one GPU."""
    reserved = config.engine.reserved_cache
    if reserved is not None:
        return tuple(_reserving(config, reserved, sizes, machine))
    return tuple(_native(config, sizes, step, machine))


def cached_token_bytes(config: RunConfig, sizes: ModelSizes, machine: Machine) -> int:
    """Return the bytes of keys and values of one token in all layers; the native engine keeps FP32 on a CPU."""
    b = 4 if config.engine.widens_cache and not machine.gpu else item_size(config.precision.roles().kv_dtype)
    return 2 * b * sizes.layers * sizes.kv


def _native(config: RunConfig, sizes: ModelSizes, step: StepSizes, machine: Machine) -> list[MemoryItem]:
    dtype = config.precision.roles().rollout_dtype
    b = item_size(dtype)
    linear = 4 if widens(config, machine, dtype) else b
    within = sizes.parameters - sizes.embedding * (1 if sizes.tied_head else 2)
    head = 4 if not machine.gpu else b
    shares = sizes.tied_head and machine.gpu
    ends = (0 if shares else b * sizes.embedding) + head * sizes.embedding
    sequences = min(config.engine.max_concurrent, -(-step.sequences // config.cluster.engines))
    length = -(-step.sequence_tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    token = cached_token_bytes(config, sizes, machine)
    return [
        MemoryItem(name="weights of the layers", num_bytes=linear * within, formula=f"{linear} x {count(within)}"),
        MemoryItem(
            name="embedding and head",
            num_bytes=ends,
            formula=f"{head} x V x H, shared" if shares else f"({b} + {head}) x V x H",
        ),
        MemoryItem(
            name="KV cache",
            num_bytes=sequences * length * token,
            formula=f"{sequences} sequences x {length} tokens x {token:,}",
        ),
        MemoryItem(
            name="logits (FP32)",
            num_bytes=_LOGITS * 4 * sequences * sizes.vocabulary,
            formula=f"{_LOGITS} x 4 x {sequences} x V",
        ),
    ]


def _reserving(config: RunConfig, reserved: CacheReservation, sizes: ModelSizes, machine: Machine) -> list[MemoryItem]:
    """Return weights and KV cache; on a GPU, the cache takes what the weights leave of its share."""
    shards = config.engine.devices
    b = item_size(config.precision.roles().rollout_dtype)
    weights = b * sizes.parameters // shards
    token = cached_token_bytes(config, sizes, machine) // shards
    cache, source = int(reserved.gib * GIB), "engine.kv_cache_gib"
    if machine.gpu:
        share = int(reserved.gpu_share * (machine.memory_bytes or 0))
        cache, source = max(0, share - weights), f"rest of {reserved.gpu_share:g} of the GPU"
    divided = f" / {shards} GPUs" if shards > 1 else ""
    return [
        MemoryItem(name="weights", num_bytes=weights, formula=f"{b} x P{divided}"),
        MemoryItem(
            name="KV cache", num_bytes=cache, formula=f"{source}: {count(cache // token)} tokens of {token:,} bytes"
        ),
    ]
