"""Turn modules of a transformers decoder into FP32 islands by hooks; no module is cast or replaced.

A hook widens an island's input before the island computes; its parameters are FP32 tensors already
(`ReplicatedWeights`). A norm that reads an FP32 residual stream returns FP32; if a half module reads its result, that
is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from betterhalf.errors import InputError
from betterhalf.precision.islands import Islands, LayerIslands

_PRE_NORM = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""Children of a decoder layer with norms before attention and MLP."""

_FOUR_NORMS = _PRE_NORM | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
"""Children of a decoder layer with norms before and after attention and MLP, such as Gemma 3's."""


def use_islands(module: Any, islands: Islands, half: torch.dtype) -> None:
    """Install the hooks of the islands in a transformers causal language model.

    Args:
        module: model whose islands have FP32 parameters.
        islands: islands resolved for the model's number of layers.
        half: compute dtype of everything else.

    Raises:
        InputError: the architecture has no such modules, or its layers have other norms, with which other tensors would
            have to be widened.
    """
    if not islands:
        return
    decoder = module.get_decoder()
    for name in islands.names:
        _require_island(module, name)
    for layer, wide in zip(decoder.layers, islands.layers, strict=True):
        _hook_layer(layer, wide, decoder.rotary_emb, half)
        if _children(layer) == _FOUR_NORMS:
            _hook_post_norms(layer, wide)
    if islands.stream_out:
        _round_result(decoder.norm, half)


def _require_island(module: Any, name: str) -> None:
    try:
        module.get_submodule(name)
        layer = module.get_submodule(".".join(name.split(".")[:3]))
        known = _children(layer) in (_PRE_NORM, _FOUR_NORMS)
    except AttributeError:
        known = False
    if not known:
        raise InputError(
            f"precision.fp32_modules: {name!r} cannot be an FP32 island in architecture "
            f"{module.config.model_type!r}; use a decoder such as llama, mistral, qwen2 or qwen3, or precision=bf16"
        )


def _children(layer: nn.Module) -> set[str]:
    return {name for name, child in layer.named_children() if type(child) is not nn.Dropout}


def _hook_layer(layer: Any, wide: LayerIslands, rotary: nn.Module, half: torch.dtype) -> None:
    widened = (
        (layer, wide.stream_in),
        (layer.self_attn.o_proj, wide.output),
        (layer.mlp, wide.mlp),
        # Experts have no down projection of their own: their layer's MLP is an island as a whole.
        (getattr(layer.mlp, "down_proj", None), wide.down),
    )
    for part, is_wide in widened:
        if is_wide and part is not None:
            part.register_forward_pre_hook(_widen_input)
    if wide.attention:
        layer.self_attn.register_forward_pre_hook(_widen_attention(layer, rotary, half), with_kwargs=True)
    if wide.stream_in and not wide.attention:
        _round_result(layer.input_layernorm, half)
    if wide.stream_mid and not wide.mlp:
        _round_result(getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm), half)


def _hook_post_norms(layer: Any, wide: LayerIslands) -> None:
    """Widen the inputs of norms whose results the residual stream reads in FP32."""
    norms = ((layer.post_attention_layernorm, wide.attention_norm), (layer.post_feedforward_layernorm, wide.mlp_norm))
    for norm, is_wide in norms:
        if is_wide:
            norm.register_forward_pre_hook(_widen_input)


def _widen_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _widen_attention(
    layer: Any, rotary: nn.Module, half: torch.dtype
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return a hook that gives attention FP32 hidden states and rope tables, and the dtype of the engine's cache.

    Attention rounds keys and values to that dtype, as the engine does.
    """

    # Some models have a table for each type of layer.
    kind = {"layer_type": layer.self_attn.layer_type} if "layer_type" in signature(rotary.forward).parameters else {}

    def widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs["hidden_states"].float()
        tables = rotary(hidden, position_ids=kwargs["position_ids"], **kind)
        return args, kwargs | {"hidden_states": hidden, "position_embeddings": tables, "cached_as": half}

    return widen


def _round_result(norm: nn.Module, half: torch.dtype) -> None:
    norm.register_forward_hook(lambda _module, _args, out: out.to(half))


class _RoundThrough(torch.autograd.Function):
    """x rounded to `dtype` and widened back to its own dtype; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def round_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `x` to `dtype` and return it in its own dtype, with the gradient of the identity."""
    out = _RoundThrough.apply(x, dtype)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
