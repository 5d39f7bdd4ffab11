"""Causal attention over packed sequences, registered with transformers: no padding, no [tokens, tokens] mask.

`attention_name` chooses one of four implementations:

    betterhalf_packed            in the tensors' own dtype: softmax(Q K^T) in FP32, probabilities rounded before the
                                 product with V, as in fused kernels; in blocks with a soft-cap, and on a CPU that
                                 multiplies the dtype natively; else by torch's scaled_dot_product_attention
    betterhalf_packed_fp32_sums  half tensors widened to FP32, softmax(Q K^T) V in FP32, the result rounded once (CPU)
    betterhalf_packed_exact      the same in tiles of fixed shape: a query's bits depend on its own sequence alone (CPU)
    betterhalf_packed_varlen     one fused kernel over all segments: torch.nn.attention.varlen (CUDA only)

A pack's segments are whole sequences, prompts that siblings share, and completions, which attend to their prompt and to
themselves. Adjacent segments of equal lengths share one call, so a pack sorted by length needs few calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from betterhalf.models.blocked_attention import ScoreRule, blocked_attention
from betterhalf.models.tiled_attention import tiled_attention
from betterhalf.precision.island_hooks import round_through
from betterhalf.precision.products import has_native_matmul

Segments = tuple[PackedSegment, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackLayout:
    """Wrapper that carries a pack's segments through a model's forward pass to its attention.

    torch.compile would compile again for every different tuple, but does not look into an object that only attention
    reads.
    """

    segments: Segments
    """Segments of the pack, in order."""


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


def _fused(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> Tensor:
    """Causal attention of N segments: q [N, heads, L, D], k and v [N, kv_heads, P + L, D] -> [N, heads, L, D].

    The last query is at the position of the last key. A mask is built only for a prefix, or if a sliding window is
    shorter than the keys. torch's kernels have no soft-cap.
    """
    queries, keys, window = q.shape[-2], k.shape[-2], rule.window
    options: dict[str, Any] = {"scale": rule.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if queries == keys and (window is None or keys <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    places = torch.arange(keys, device=q.device)
    distance = places[keys - queries :, None] - places[None, :]
    visible = (distance >= 0) & (distance < (window or keys))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, **options)


_Attend = Callable[[Tensor, Tensor, Tensor, ScoreRule], Tensor]
"""(q [N, heads, L, D], k, v [N, kv_heads, P + L, D], rule) -> [N, heads, L, D]."""


def _by_batch(attend: _Attend, q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Call `attend` for each batch of segments: q [1, heads, T, D], k and v [1, kv_heads, T, D] -> [1, T, heads, D]."""
    batches = segment_batches(segments)
    queries, keys, values = (
        _folded(q, batches),
        _after_prefixes(_folded(k, batches), batches),
        _after_prefixes(_folded(v, batches), batches),
    )
    parts = []
    for fold_q, fold_k, fold_v in zip(queries, keys, values, strict=True):
        out = attend(fold_q, fold_k, fold_v, rule)
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


def _own_dtype(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attention in the query's dtype: in blocks for a soft-cap, or a native dtype on a CPU; else by torch's kernel."""
    if rule.cap is None and (q.is_cuda or not has_native_matmul(q.dtype)):
        return _by_batch(_fused, q, k, v, segments, rule)
    return _blocked(q, k, v, segments, rule, q.dtype)


def _widened(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attention on operands widened to FP32; the result is rounded once to the query's dtype."""
    return _blocked(q, k, v, segments, rule, torch.float32)


def _exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attention on operands widened to FP32, independent of the pack; the result is rounded once."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> Tensor:
        return tiled_attention(q, k, v, rule)

    return _by_batch(attend, q.float(), k.float(), v.float(), segments, rule).to(q.dtype)


def _blocked(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule, operands: torch.dtype) -> Tensor:
    """Attention by `blocked_attention`, batch by batch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> Tensor:
        return blocked_attention(q, k, v, rule, operands=operands)

    # Widened before siblings share their prompt, so that the prompt's gradients are added in FP32.
    return _by_batch(attend, q.float(), k.float(), v.float(), segments, rule).to(q.dtype)


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attention in one call of torch's variable-length flash attention; FP32 and soft-caps go batch by batch."""
    if q.dtype == torch.float32 or rule.cap is not None:
        return _own_dtype(q, k, v, segments, rule)
    # Imported here: the module loads CUDA kernels.
    from torch.nn.attention.varlen import varlen_attn

    spans = _spans(segments, q.device)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    k, v = (repeat_prefixes(x, segments) for x in (k, v))
    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if _asks_for_groups(varlen_attn) else {}
    # With more keys than queries, the kernel aligns the causal mask and the window to the last key, as `_fused` does.
    ends = (rule.window - 1 if rule.window else -1, 0)
    out = varlen_attn(q, k, v, *spans.offsets, *spans.longest, scale=rule.scale, window_size=ends, **grouped)
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


def for_transformers(kernel: Callable[..., Tensor]) -> AttentionFunction:
    """Give a kernel the signature that transformers calls: query [1, heads, T, D], key and value [1, kv_heads, T, D].

    Besides transformers' own keywords the function takes `layout`, which arrives through the model's forward call, and
    `cached_as` from an FP32 island: the dtype of the engine's cache, to which keys and values are rounded. It returns
    [1, T, heads, D], and raises InputError if the model asks for anything else, such as dropout or sinks.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        layout: PackLayout | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cached_as: torch.dtype | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if dropout:
            raise InputError(
                f"attention_dropout={dropout} would make the trainer's logprobs random; set it to 0 in the model's "
                "configuration"
            )
        _require_understood(attention_mask, others)
        if getattr(module, "is_causal", True) is False:
            raise InputError("the model's attention is not causal, and attention over packed sequences is")
        if layout is None:
            raise InputError(
                "the model's layers do not pass keywords on to attention, which then lacks the pack's layout"
            )
        if cached_as is not None:
            key, value = round_through(key, cached_as), round_through(value, cached_as)
        rule = ScoreRule(scale=scaling, window=sliding_window, cap=softcap)
        return kernel(query, key, value, layout.segments, rule), None

    return attend


_WITHOUT_EFFECT = frozenset(
    (
        *("position_ids", "position_embeddings", "cache_position", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
    )
)
"""Keywords that models pass on to attention, and that do not change its result."""

_MEANINGS = {"s_aux": "attention sinks"}
"""Keyword of an attention function -> words for a message."""


def _require_understood(mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """Refuse whatever else a model asks of its attention, rather than ignore it.

    Raises:
        InputError: there is a mask, or a keyword whose effect is not implemented; the message names it.
    """
    asked = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if others.get("is_causal") is True:
        asked.remove("is_causal")
    if mask is not None:
        asked.append("a mask of its own")
    if asked:
        raise InputError(
            f"the model's attention has {', '.join(_MEANINGS.get(name, name) for name in asked)}, which attention over "
            "packed sequences does not compute"
        )


packed_attention = for_transformers(_own_dtype)
packed_attention_fp32_sums = for_transformers(_widened)
packed_attention_exact = for_transformers(_exact)
packed_attention_varlen = for_transformers(_varlen)

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
