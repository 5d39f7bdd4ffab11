"""Causal attention over packed sequences, registered with transformers: no padding, no [tokens, tokens] mask.

`attention_name` chooses one of four implementations:

    betterhalf_packed            in the tensors' own dtype: softmax(Q K^T) in FP32, probabilities rounded before the
                                 product with V, as in fused kernels; in blocks on a CPU, elsewhere by torch's
                                 scaled_dot_product_attention
    betterhalf_packed_fp32_sums  half tensors widened to FP32, softmax(Q K^T) V in FP32, the result rounded once (CPU)
    betterhalf_packed_exact      the same in tiles of fixed shape: a query's bits depend on its own sequence alone (CPU)
    betterhalf_packed_varlen     one fused kernel over all segments: torch.nn.attention.varlen (CUDA only)

A pack's segments are whole sequences, prompts that siblings share, and completions, which attend to their prompt and to
themselves. Adjacent segments of equal lengths share one call, so a pack sorted by length needs few calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from inspect import signature
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from betterhalf.batches import PackedSegment
from betterhalf.errors import InputError
from betterhalf.models.blocked_attention import blocked_attention
from betterhalf.models.tiled_attention import tiled_attention
from betterhalf.precision.island_hooks import round_through
from betterhalf.precision.products import has_native_matmul

Segments = tuple[PackedSegment, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackLayout:
    """Wrapper around a pack's segments, in which they travel through a model's forward pass to its attention.

    torch.compile would compile again for every different tuple, but does not look into an object that only attention
    reads.
    """

    segments: Segments
    """Segments of the pack, in order."""


_ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Layer types whose only exchange between positions goes through the registered attention function."""


def attention_name(device: torch.device, head_dim: int, *, fp32_sums: bool, exact: bool) -> str:
    """Return the name of the implementation for the trainer's attention on this device.

    Flash attention needs an Ampere GPU or newer and a head dimension that is a multiple of 8 up to 256.
    """
    if device.type == "cuda":
        flash = torch.cuda.get_device_capability(device) >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256
        return "betterhalf_packed_varlen" if flash else "betterhalf_packed"
    if exact:
        return "betterhalf_packed_exact"
    return "betterhalf_packed_fp32_sums" if fp32_sums else "betterhalf_packed"


def require_packable(module: Any) -> None:
    """Refuse a model whose positions exchange information outside the registered attention, or that changes its logits.

    Raises:
        InputError: the model has state-space, convolutional or unknown mixers, attention sinks, or post-processed
            logits.
    """
    config = module.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not module._supports_attention_backend or not kinds <= _ATTENTION_TYPES or _has_convolution(module):
        raise InputError(
            f"architecture {config.model_type!r} mixes positions outside attention ({', '.join(sorted(kinds))}), so "
            "packed sequences would leak into each other; use a decoder such as llama, mistral, qwen2 or qwen3"
        )
    if any(name.endswith(".sinks") for name, _ in module.named_parameters()):
        raise InputError(
            f"architecture {config.model_type!r} has attention sinks, which attention over packed sequences does not "
            "support; use a decoder such as llama, mistral, qwen2 or qwen3"
        )
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise InputError(
                f"architecture {config.model_type!r} post-processes its logits ({key}={getattr(config, key)}), which "
                "the chunked logprobs do not support; use a decoder such as llama, mistral, qwen2 or qwen3"
            )


def _has_convolution(module: torch.nn.Module) -> bool:
    return any(isinstance(part, torch.nn.Conv1d | torch.nn.Conv2d) for part in module.modules())


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBatch:
    """Adjacent segments of equal length whose prefixes have equal lengths too; they share one attention call."""

    count: int
    """Number of segments, N."""
    length: int
    """Tokens of each segment, L."""
    prefix_length: int
    """Tokens of each segment's prefix, P; 0 without prefixes."""
    prefixes: tuple[tuple[int, int], ...]
    """[N] (index of a batch, index within it) of each segment's prefix; empty without prefixes."""


@lru_cache(maxsize=64)
def segment_batches(segments: Segments) -> tuple[SegmentBatch, ...]:
    """Group a pack's segments into batches, in order; cached, since every layer asks for them."""
    batches: list[SegmentBatch] = []
    places: list[tuple[int, int]] = []

    def lengths(segment: PackedSegment) -> tuple[int, int]:
        return segment.length, _prefix_length(segments, segment)

    for (length, prefix_length), group in groupby(segments, key=lengths):
        members = tuple(group)
        places.extend((len(batches), k) for k in range(len(members)))
        prefixes = tuple(places[member.prefix] for member in members if member.prefix is not None)
        batches.append(SegmentBatch(count=len(members), length=length, prefix_length=prefix_length, prefixes=prefixes))
    return tuple(batches)


def _prefix_length(segments: Segments, segment: PackedSegment) -> int:
    """Return the length of the segment's prefix; 0 without one."""
    return 0 if segment.prefix is None else segments[segment.prefix].length


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of N segments: q [N, heads, L, D], k and v [N, kv_heads, P + L, D] -> [N, heads, L, D].

    The last query is at the position of the last key. A mask is built only for a prefix, or if a sliding window is
    shorter than the keys.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    grouped = q.shape[1] != k.shape[1]
    if queries == keys and (window is None or keys <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    places = torch.arange(keys, device=q.device)
    distance = places[keys - queries :, None] - places[None, :]
    visible = (distance >= 0) & (distance < (window or keys))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)


_Attend = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]
"""(q [N, heads, L, D], k, v [N, kv_heads, P + L, D], scale, window) -> [N, heads, L, D]."""


def _by_batch(
    attend: _Attend, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    """Call `attend` for each batch of segments: q [1, heads, T, D], k and v [1, kv_heads, T, D] -> [1, T, heads, D]."""
    batches = segment_batches(segments)
    queries, keys, values = (
        _folded(q, batches),
        _after_prefixes(_folded(k, batches), batches),
        _after_prefixes(_folded(v, batches), batches),
    )
    parts = []
    for fold_q, fold_k, fold_v in zip(queries, keys, values, strict=True):
        out = attend(fold_q, fold_k, fold_v, scale, window)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).unsqueeze(0)


def _folded(x: Tensor, batches: tuple[SegmentBatch, ...]) -> list[Tensor]:
    """Split the pack's rows, [1, heads, T, D], into those of each batch, [N, heads, L, D]."""
    pieces = torch.split(x[0], [batch.count * batch.length for batch in batches], dim=1)
    return [
        piece.reshape(x.shape[1], batch.count, batch.length, x.shape[3]).transpose(0, 1)
        for batch, piece in zip(batches, pieces, strict=True)
    ]


def _after_prefixes(folded: list[Tensor], batches: tuple[SegmentBatch, ...]) -> list[Tensor]:
    """Prepend the prefixes' keys (or values) to those of each batch: [N, kv_heads, P + L, D]."""
    # One unbind for each batch that holds prompts: its gradient is one stack, however many siblings there are.
    prompts = {index: folded[index].unbind() for index in {index for batch in batches for index, _ in batch.prefixes}}
    return [
        torch.cat((torch.stack([prompts[index][place] for index, place in batch.prefixes]), own), dim=2)
        if batch.prefixes
        else own
        for batch, own in zip(batches, folded, strict=True)
    ]


def _own_dtype(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """Attention in the query's dtype; formats that a CPU cannot multiply natively are left to torch's kernel."""
    if q.is_cuda or not has_native_matmul(q.dtype):
        return _by_batch(_fused, q, k, v, segments, scale, window)
    return _blocked(q, k, v, segments, scale, window, q.dtype)


def _widened(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """Attention on operands widened to FP32; the result is rounded once to the query's dtype."""
    return _blocked(q, k, v, segments, scale, window, torch.float32)


def _exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """Attention on operands widened to FP32, independent of the pack; the result is rounded once."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        return tiled_attention(q, k, v, scale=scale, window=window)

    return _by_batch(attend, q.float(), k.float(), v.float(), segments, scale, window).to(q.dtype)


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, operands: torch.dtype
) -> Tensor:
    """Attention by `blocked_attention`, batch by batch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        return blocked_attention(q, k, v, scale=scale, window=window, operands=operands)

    # Widened before siblings share their prompt, so that the prompt's gradients are added in FP32.
    return _by_batch(attend, q.float(), k.float(), v.float(), segments, scale, window).to(q.dtype)


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """Attention in one call of torch's variable-length flash attention; FP32 tensors go batch by batch."""
    if q.dtype == torch.float32:
        return _by_batch(_fused, q, k, v, segments, scale, window)
    # Imported here: the module loads CUDA kernels.
    from torch.nn.attention.varlen import varlen_attn

    spans = _spans(segments, q.device)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    k, v = (repeat_prefixes(x, segments) for x in (k, v))
    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if _asks_for_groups(varlen_attn) else {}
    # With more keys than queries, the kernel aligns the causal mask and the window to the last key, as `_fused` does.
    ends = (window - 1 if window else -1, 0)
    out = varlen_attn(q, k, v, *spans.offsets, *spans.longest, scale=scale, window_size=ends, **grouped)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Spans:
    """Rows of each segment, for queries and for keys."""

    offsets: tuple[Tensor, Tensor]
    """int32 [segments + 1] each: first row of every segment, then the number of rows."""
    longest: tuple[int, int]
    """Rows of the longest segment."""


@lru_cache(maxsize=64)
def _spans(segments: Segments, device: torch.device) -> _Spans:
    """Return the spans of a pack; cached, since every layer asks, and each copy to a GPU waits for it."""
    queries = [segment.length for segment in segments]
    keys = [segment.length + _prefix_length(segments, segment) for segment in segments]
    first, second = (torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in (queries, keys))
    return _Spans(offsets=(first, second), longest=(max(queries), max(keys)))


@cache
def _asks_for_groups(varlen_attn: Callable[..., Any]) -> bool:
    """Return whether the function must be told that queries share key heads; torch before 2.12 has no such argument."""
    return "enable_gqa" in signature(varlen_attn).parameters


def repeat_prefixes(x: Tensor, segments: Segments) -> Tensor:
    """Copy each segment's prefix before it: keys or values [T, kv_heads, D] -> [sum of P + L, kv_heads, D]."""
    if all(segment.prefix is None for segment in segments):
        return x
    own = torch.split(x, [segment.length for segment in segments])
    prefixes = [() if segment.prefix is None else (own[segment.prefix],) for segment in segments]
    return torch.cat([part for before, rows in zip(prefixes, own, strict=True) for part in (*before, rows)])


AttentionFunction = Callable[..., tuple[Tensor, None]]


def _for_transformers(kernel: Callable[..., Tensor]) -> AttentionFunction:
    """Give a kernel the signature that transformers calls: query [1, heads, T, D], key and value [1, kv_heads, T, D].

    Besides transformers' own keywords the function takes `layout`, which arrives through the model's forward call, and
    `cached_as` from an FP32 island: the dtype of the engine's cache, to which keys and values are rounded. It returns
    [1, T, heads, D], and raises InputError if the model asks for attention dropout.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        layout: PackLayout,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        cached_as: torch.dtype | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if dropout:
            raise InputError(
                f"attention_dropout={dropout} would make the trainer's logprobs random; set it to 0 in the model's "
                "configuration"
            )
        if cached_as is not None:
            key, value = round_through(key, cached_as), round_through(value, cached_as)
        return kernel(query, key, value, layout.segments, scaling, sliding_window), None

    return attend


packed_attention = _for_transformers(_own_dtype)
packed_attention_fp32_sums = _for_transformers(_widened)
packed_attention_exact = _for_transformers(_exact)
packed_attention_varlen = _for_transformers(_varlen)

_IMPLEMENTATIONS: dict[str, AttentionFunction] = {
    "betterhalf_packed": packed_attention,
    "betterhalf_packed_fp32_sums": packed_attention_fp32_sums,
    "betterhalf_packed_exact": packed_attention_exact,
    "betterhalf_packed_varlen": packed_attention_varlen,
}


def use_packed_attention(module: Any, name: str, *, compiled: bool = False) -> None:
    """Make a transformers model use the registered implementation `name` for its attention.

    Set `compiled` if torch.compile will compile the layers; attention is then hidden from it.
    """
    attend = _IMPLEMENTATIONS[name]
    if compiled:
        name, attend = f"{name}_opaque", torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
    AttentionInterface.register(name, attend)
    module.set_attn_implementation(name)
