"""Memory of one rank of the trainer, item by item.

Letters in the formulas: P parameters, S parameters of one shard, A parameters of LoRA adapters, L layers, H width of
the residual stream, Q of all queries, K of all keys, I of the MLP, T tokens of the largest pack, C its completion
tokens, V vocabulary, b bytes of a number in the compute dtype. `tests/unit/diagnostics/test_memory.py` compares each
item with the tensors of a real trainer.
"""

from __future__ import annotations

from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.sizes import Machine, MemoryItem, ModelSizes, StepSizes, count, item_size, storage_name

_BACKWARD_WIDTHS = 4
"""Tensors [T, I] beside the saved ones at the peak of the backward pass of one MLP: measured on a CPU, FP32."""


def rank_items(
    config: RunConfig, sizes: ModelSizes, step: StepSizes, machine: Machine, *, keeps_reference: bool
) -> tuple[MemoryItem, ...]:
    """Return the memory of one rank on its device during training; optimizer states on the host are left out.

    Args:
        config: configuration of the run.
        sizes: sizes of its model.
        step: sizes of its largest pack.
        machine: device, and how its CPU multiplies halves.
        keeps_reference: True if the algorithm scores with a reference policy.
    """
    items = [*_weights(config, sizes), *_computing(config, sizes, machine)]
    if keeps_reference:
        items.append(_copy("reference policy", config, sizes))
    if config.pipeline.max_staleness:
        items.append(_copy("weights that sampled", config, sizes))
    return (*items, *_pass(config, sizes, step, machine))


def host_items(config: RunConfig, sizes: ModelSizes, machine: Machine, *, reads_rows: bool) -> tuple[MemoryItem, ...]:
    """Return the host memory of one rank on a GPU, without the libraries; empty for a rank on a CPU.

    A rank that holds all weights loads the FP32 model there. One of several reads its rows of one weight at a time,
    unless the files cannot be read in parts: rank 0 then loads them whole and sends the others their rows.

    Args:
        config: configuration of the run.
        sizes: sizes of its model.
        machine: device.
        reads_rows: False if the files cannot be read in parts.
    """
    items = list[MemoryItem]()
    if not machine.gpu:
        return ()
    if not is_sharded(config):
        items.append(_brief("FP32 model while it loads", 4 * sizes.parameters, "4 x P"))
    elif not reads_rows:
        items.append(_brief("FP32 model while it loads", 4 * sizes.parameters, "4 x P, in rank 0 alone"))
    if config.cluster.trainer.offload_optimizer:
        own = 16 * shard(config, sizes.trained)
        items.append(MemoryItem(name="masters, gradients, AdamW states", num_bytes=own, formula="16 x S, offloaded"))
    return tuple(items)


def is_sharded(config: RunConfig) -> bool:
    """Return whether FSDP2 shards the weights: several ranks, or one that offloads its states."""
    return config.cluster.trainers > 1 or config.cluster.trainer.offload_optimizer


def shard(config: RunConfig, parameters: int) -> int:
    """Return the number of parameters on one rank, of this total; rounded up."""
    return -(-parameters // config.cluster.trainers)


def widens(config: RunConfig, machine: Machine, dtype: str) -> bool:
    """Return whether products of this half format use operands widened to FP32; see `Precision.fp32_sums`."""
    if machine.gpu or dtype == "fp32":
        return False
    if config.precision.half_matmul == "auto" and not config.exact:
        return storage_name(dtype) not in machine.native_halves  # type: ignore[arg-type]
    return config.exact or config.precision.half_matmul == "fp32_sums"


def _weights(config: RunConfig, sizes: ModelSizes) -> list[MemoryItem]:
    """Return the items of masters, gradients and optimizer states; none if they are offloaded."""
    if config.cluster.trainer.offload_optimizer:
        return []
    own, letter = shard(config, sizes.trained), _letter(config, sizes)
    what = f"{letter} = {count(own)}"
    return [
        MemoryItem(name="masters (FP32)", num_bytes=4 * own, formula=f"4 x {letter}, {what}"),
        MemoryItem(name="gradients (FP32)", num_bytes=4 * own, formula=f"4 x {letter}"),
        MemoryItem(name="AdamW states (FP32)", num_bytes=8 * own, formula=f"8 x {letter}"),
    ]


def _letter(config: RunConfig, sizes: ModelSizes) -> str:
    """Return the formula of the number of trained parameters on one rank."""
    if sizes.adapters:
        return "A / ranks" if is_sharded(config) else "A"
    return "S" if is_sharded(config) else "P"


def _frozen(config: RunConfig, sizes: ModelSizes, b: int, *, widened: bool) -> list[MemoryItem]:
    """Return the items that adapters add: their computing weights, and the frozen base if it is sharded or in FP32."""
    items = []
    if is_sharded(config):
        own = shard(config, sizes.parameters)
        items.append(MemoryItem(name="frozen base", num_bytes=b * own, formula=f"{b} x S, S = {count(own)}"))
    elif b == 4:
        items.append(MemoryItem(name="frozen base", num_bytes=4 * sizes.parameters, formula="4 x P"))
    each = (b if b < 4 or is_sharded(config) else 0) + (4 if widened else 0)
    return [*items, MemoryItem(name="computing adapters", num_bytes=each * sizes.adapters, formula=f"{each} x A")]


def _computing(config: RunConfig, sizes: ModelSizes, machine: Machine) -> list[MemoryItem]:
    """Return the items of the weights used in the computation, including those gathered from other ranks' shards."""
    dtype = config.precision.roles().compute_dtype
    b, items = item_size(dtype), list[MemoryItem]()
    if sizes.adapters:
        items += _frozen(config, sizes, b, widened=widens(config, machine, dtype))
    if is_sharded(config):
        items += _gathered(sizes, b, machine)
    elif dtype != "fp32":
        items.append(
            MemoryItem(name=f"computing weights ({dtype})", num_bytes=b * sizes.parameters, formula=f"{b} x P")
        )
    if not machine.gpu and dtype != "fp32":
        wide = sizes.parameters if sizes.tied_head else sizes.parameters - sizes.embedding
        head_only = not widens(config, machine, dtype)
        number = sizes.embedding if head_only else wide
        formula = "4 x V x H, for the logits" if head_only else "4 x (P - embedding)" if wide < sizes.parameters else ""
        items.append(MemoryItem(name="widened weights (FP32)", num_bytes=4 * number, formula=formula or "4 x P"))
    return items


def _gathered(sizes: ModelSizes, b: int, machine: Machine) -> list[MemoryItem]:
    """Return the items gathered from all shards: the head, and layers during passes; on a CPU all layers stay."""
    layer, within = sizes.layer_parameters, sizes.parameters - sizes.embedding
    own = sizes.adapters // sizes.layers or layer
    items = [MemoryItem(name="whole head", num_bytes=b * sizes.embedding, formula=f"{b} x V x H")]
    total = MemoryItem(name="sum of the head's gradients (FP32)", num_bytes=4 * sizes.embedding, formula="4 x V x H")
    items += [] if sizes.adapters else [total]
    reduced = _brief(
        "gradients being reduced", (b + 4) * own, f"({b} + 4) x {count(own)}: a layer as computed and in FP32"
    )
    if not machine.gpu:
        layers = MemoryItem(name="gathered layers", num_bytes=b * within, formula=f"{b} x (P - V x H): they stay")
        return [*items, layers, reduced]
    items.append(_brief("gathered layers", 2 * b * layer, f"2 x {b} x {count(layer)}: this and the next"))
    if not sizes.tied_head:
        items.append(_brief("gathered embedding", b * sizes.embedding, f"{b} x V x H"))
    return [*items, reduced]


def _brief(name: str, num_bytes: int, formula: str) -> MemoryItem:
    """Return an item that is held only while a pass runs."""
    return MemoryItem(name=name, num_bytes=num_bytes, formula=formula, lasts=False)


def _copy(name: str, config: RunConfig, sizes: ModelSizes) -> MemoryItem:
    """Return a copy of the weights, or of a shard, in the compute dtype."""
    b = item_size(config.precision.roles().compute_dtype)
    return MemoryItem(name=name, num_bytes=b * shard(config, sizes.trained), formula=f"{b} x {_letter(config, sizes)}")


def _pass(config: RunConfig, sizes: ModelSizes, step: StepSizes, machine: Machine) -> list[MemoryItem]:
    """Return the items that a forward and backward pass over the largest pack adds."""
    b = item_size(config.precision.roles().compute_dtype)
    per_layer, formula = layer_activations(sizes, b, gpu=machine.gpu)
    tokens = step.pack_tokens
    if config.training.activation_checkpointing:
        saved, formula = sizes.layers * b * sizes.hidden + per_layer, f"L x {b} x H + one layer of {formula}"
    else:
        saved, formula = sizes.layers * per_layer, f"L x ({formula})"
    last = (4 + b) * sizes.hidden * tokens + 2 * b * sizes.hidden * step.loss_tokens
    wide = b if machine.gpu else 4
    passing = _BACKWARD_WIDTHS * wide * max(sizes.experts_per_token, 1) * sizes.intermediate
    logits = 4 * min(config.training.logits_mib * 2**18, step.loss_tokens * sizes.vocabulary)
    head_gradient = 0 if b == 4 or sizes.adapters else b * sizes.embedding
    return [
        _brief("activations", tokens * saved + last, f"T = {count(tokens)}, T x ({formula})"),
        _brief("backward pass of one MLP", tokens * passing, f"T x {_BACKWARD_WIDTHS} x {wide} x I"),
        _brief("logits (FP32)", logits, "4 x C x V, at most training.logits_mib"),
        _brief("head's gradient of a pack", head_gradient, f"{b} x V x H"),
    ]


def layer_activations(sizes: ModelSizes, b: int, *, gpu: bool) -> tuple[int, str]:
    """Return the bytes for each token that one decoder layer keeps for its backward pass, and their formula.

    Each of two norms keeps its input in FP32, the normalised rows and its result; the MLP keeps gate, its activation,
    up and their product. On a CPU attention keeps queries, keys and values in FP32.

    Args:
        sizes: sizes of the model.
        b: bytes of a number in the compute dtype.
        gpu: False for attention on FP32 operands.
    """
    norms = 2 * (4 + 2 * b) * sizes.hidden
    operands = (b if gpu else 4) * (sizes.query + 2 * sizes.kv) + b * sizes.query
    if sizes.qk_norm:
        operands += (4 + b) * (sizes.query + sizes.kv)
    mlp = 4 * b * max(sizes.experts_per_token, 1) * sizes.intermediate
    # A mixture of experts gathers each token's row for each of its experts, and keeps their results.
    mlp += 2 * b * sizes.experts_per_token * sizes.hidden
    formula = f"{2 * (4 + 2 * b)} x H + {operands:,} of attention + {mlp:,} of the MLP"
    return norms + operands + mlp, formula
