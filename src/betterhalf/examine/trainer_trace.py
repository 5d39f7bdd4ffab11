"""Trace of the trainer: the result of every operation in its transformers module, in the layout of the engine's taps.

Forward hooks record the input and output of each module. Rotated queries and keys exist only as arguments of the
attention function, which is wrapped while the trace is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from betterhalf.diagnostics.divergence import Place, Trace
from betterhalf.rollout.native.decoder import OPERATIONS
from betterhalf.training.pack import pack_sequence
from betterhalf.training.policy_trainer import PolicyTrainer

_Keep = Callable[[str, int | None, Tensor], None]
"""Called with (operation, layer, result [1, T, ...])."""

_AROUND_LAYER: dict[str, tuple[str | None, str | None]] = {
    "input_layernorm": (None, "attention_norm"),
    "self_attn.q_proj": (None, "queries"),
    "self_attn.k_proj": (None, "keys"),
    "self_attn.v_proj": (None, "values"),
    "self_attn.o_proj": ("attention", "attention_output"),
    "post_attention_layernorm": ("attention_residual", "mlp_norm"),
    "mlp.gate_proj": (None, "gate"),
    "mlp.up_proj": (None, "up"),
    "mlp.down_proj": ("swiglu", "down"),
}
"""Module of a layer -> (operation whose result is its input, operation whose result is its output)."""


@torch.no_grad()
def trainer_trace(trainer: PolicyTrainer, token_ids: tuple[int, ...]) -> Trace:
    """Score one sequence with the trainer, and return every operation's result [T, ...]."""
    found: dict[Place, Tensor] = {}

    def keep(operation: str, layer: int | None, result: Tensor) -> None:
        found[operation, layer] = result[0].detach().clone()

    decoder = trainer.module.get_decoder()
    with ExitStack() as hooks:
        _hook_ends(decoder, keep, hooks)
        for index, layer in enumerate(decoder.layers):
            _hook_layer(index, layer, keep, hooks)
        hooks.enter_context(_rotated_heads(trainer.attention, keep))
        trainer.measure([pack_sequence(token_ids)])
    return _in_order(found, len(decoder.layers))


@torch.no_grad()
def trainer_logits(trainer: PolicyTrainer, hidden: Tensor) -> Tensor:
    """Return FP32 logits [N, V] of final hidden states [N, H], computed as in the trainer's scoring."""
    return trainer.head().logits(hidden)


def _hook_ends(decoder: Any, keep: _Keep, hooks: ExitStack) -> None:
    """Record the embedding, the residual stream between layers, and the final norm."""
    last = len(decoder.layers) - 1
    for index, layer in enumerate(decoder.layers):
        operation, before = ("mlp_residual", index - 1) if index else ("embedding", None)
        hooks.enter_context(_input_of(layer, operation, before, keep))
    hooks.enter_context(_input_of(decoder.norm, "mlp_residual", last, keep))
    hooks.enter_context(_output_of(decoder.norm, "final_norm", None, keep))


def _hook_layer(index: int, layer: nn.Module, keep: _Keep, hooks: ExitStack) -> None:
    for name, (before, after) in _AROUND_LAYER.items():
        module = layer.get_submodule(name)
        if before is not None:
            hooks.enter_context(_input_of(module, before, index, keep))
        if after is not None:
            hooks.enter_context(_output_of(module, after, index, keep))


@contextmanager
def _input_of(module: nn.Module, operation: str, layer: int | None, keep: _Keep) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(operation, layer, args[0] if args else kwargs["hidden_states"])

    with module.register_forward_pre_hook(before, with_kwargs=True):
        yield


@contextmanager
def _output_of(module: nn.Module, operation: str, layer: int | None, keep: _Keep) -> Iterator[None]:
    def after(_: nn.Module, __: tuple[Any, ...], result: Tensor) -> None:
        keep(operation, layer, result)

    with module.register_forward_hook(after):
        yield


@contextmanager
def _rotated_heads(name: str, keep: _Keep) -> Iterator[None]:
    """Record queries and keys as they enter the attention registered under this name."""
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        keep("rotated_queries", module.layer_idx, query.transpose(1, 2))
        keep("rotated_keys", module.layer_idx, key.transpose(1, 2))
        return attend(module, query, key, value, *args, **kwargs)

    # An entry of the instance takes precedence over the one registered for the class, which is not changed.
    ALL_ATTENTION_FUNCTIONS[name] = recording
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.pop(name)


def _in_order(found: dict[Place, Tensor], layers: int) -> Trace:
    """Return every result in the order of computation, heads as [T, heads, D], gate and up concatenated."""
    for layer in range(layers):
        head_dim = found["rotated_queries", layer].shape[-1]
        for operation in ("queries", "keys", "values"):
            rows = found[operation, layer]
            found[operation, layer] = rows.view(rows.shape[0], -1, head_dim)
        found["gate_up", layer] = torch.cat((found["gate", layer], found["up", layer]), -1)
    return {place: found[place] for place in _places(layers)}


def _places(layers: int) -> list[Place]:
    first, *within, last = OPERATIONS
    inner: list[Place] = [(operation, layer) for layer in range(layers) for operation in within]
    return [(first, None), *inner, (last, None)]
