"""Causal attention over packed sequences, registered with transformers: no padding, no [tokens, tokens] mask.

Three implementations, chosen by `attention_name`:

    betterhalf_packed            torch's scaled_dot_product_attention in the tensors' own dtype, sequence by sequence
    betterhalf_packed_fp32_sums  half tensors widened to FP32, softmax(Q K^T) V in FP32, the result rounded once (CPU)
    betterhalf_packed_varlen     one fused kernel over all sequences: torch.nn.attention.varlen (CUDA only)

Sequences of the same length that lie side by side share one call, so a pack sorted by length needs few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from betterhalf.errors import InputError
from betterhalf.precision.island_hooks import round_through

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Layer types whose only exchange between positions goes through the registered attention function."""


def attention_name(device: torch.device, head_dim: int, *, fp32_sums: bool) -> str:
    """Which registered implementation to use for trainer attention on this device.

    Flash attention needs an Ampere GPU or newer and a head dimension that is a multiple of 8 up to 256.
    """
    if device.type == "cuda":
        flash = torch.cuda.get_device_capability(device) >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256
        return "betterhalf_packed_varlen" if flash else "betterhalf_packed"
    return "betterhalf_packed_fp32_sums" if fp32_sums else "betterhalf_packed"


def require_packable(module: Any) -> None:
    """Refuse a model whose positions exchange information other than through the registered attention.

    Raises:
        InputError: state-space, convolutional or otherwise unknown mixers, or logits that are post-processed.
    """
    config = module.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not module._supports_attention_backend or not kinds <= _ATTENTION_TYPES or _has_convolution(module):
        raise InputError(
            f"architecture {config.model_type!r} mixes positions outside attention ({', '.join(sorted(kinds))}), so "
            "packed sequences would leak into each other; use a decoder such as llama, mistral, qwen2 or qwen3"
        )
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise InputError(
                f"architecture {config.model_type!r} changes its logits ({key}={getattr(config, key)}), which the "
                "chunked logprobs do not; use a decoder such as llama, mistral, qwen2 or qwen3"
            )


def _has_convolution(module: torch.nn.Module) -> bool:
    return any(isinstance(part, torch.nn.Conv1d | torch.nn.Conv2d) for part in module.modules())


def equal_length_runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(first token, number of sequences, length) of each run of neighbours of equal length."""
    start = 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        yield start, count, length
        start += count * length


def _sequence_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of N equally long sequences, [N, heads, L, D]; a sliding window masks only where it binds."""
    length = q.shape[-2]
    grouped = q.shape[1] != k.shape[1]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)[None, :]
    visible = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)


def _by_runs(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    """Attention within each sequence: q [1, heads, T, D], k and v [1, kv_heads, T, D] -> [1, T, heads, D]."""
    parts = []
    for start, count, length in equal_length_runs(lengths):
        stop = start + count * length
        fold_q, fold_k, fold_v = (
            x[0, :, start:stop].reshape(x.shape[1], count, length, x.shape[3]).transpose(0, 1) for x in (q, k, v)
        )
        out = _sequence_attention(fold_q, fold_k, fold_v, scale, window)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).unsqueeze(0)


def _widened(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    """As `_by_runs`, on operands widened to FP32; the result is rounded once to the query's dtype."""
    return _by_runs(q.float(), k.float(), v.float(), lengths, scale, window).to(q.dtype)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    """As `_by_runs`, in one call of torch's variable-length flash attention; FP32 tensors go run by run."""
    if q.dtype == torch.float32:
        return _by_runs(q, k, v, lengths, scale, window)
    # Imported here: the module loads CUDA kernels.
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
    longest, siblings = max(lengths), q.shape[1] // k.shape[1]
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    if siblings > 1:
        k, v = (x.repeat_interleave(siblings, dim=1) for x in (k, v))
    left = window - 1 if window else -1
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(left, 0))
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


AttentionFunction = Callable[..., tuple[Tensor, None]]


def _for_transformers(kernel: Callable[..., Tensor]) -> AttentionFunction:
    """A kernel with the signature that transformers calls: query [1, heads, T, D], key and value [1, kv_heads, T, D].

    Besides transformers' own keywords it takes `sequence_lengths`, passed through the model's forward, and `cached_as`
    from an FP32 island: the grid of the engine's cache, to which keys and values are rounded. The returned function
    gives [1, T, heads, D], and raises InputError when the model asks for attention dropout.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        sequence_lengths: tuple[int, ...],
        dropout: float = 0.0,
        sliding_window: int | None = None,
        cached_as: torch.dtype | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if dropout:
            raise InputError(
                f"attention_dropout={dropout} would make pi random; set it to 0 in the model's configuration"
            )
        if cached_as is not None:
            key, value = round_through(key, cached_as), round_through(value, cached_as)
        return kernel(query, key, value, sequence_lengths, scaling, sliding_window), None

    return attend


packed_attention = _for_transformers(_by_runs)
packed_attention_fp32_sums = _for_transformers(_widened)
packed_attention_varlen = _for_transformers(_varlen)

_IMPLEMENTATIONS: dict[str, AttentionFunction] = {
    "betterhalf_packed": packed_attention,
    "betterhalf_packed_fp32_sums": packed_attention_fp32_sums,
    "betterhalf_packed_varlen": packed_attention_varlen,
}


def use_packed_attention(module: Any, name: str) -> None:
    """Make a transformers model use one of the implementations above for its attention."""
    AttentionInterface.register(name, _IMPLEMENTATIONS[name])
    module.set_attn_implementation(name)
