"""Forward pass of the native engine: prompts in one packed pass, then one token for each active slot.

T packed tokens, B slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from betterhalf.kernels import fused
from betterhalf.precision.islands import Islands, resolve_islands
from betterhalf.precision.products import product
from betterhalf.precision.routing import RoutingTape
from betterhalf.precision.tiled_products import tiled_product
from betterhalf.rollout.native.attention import decode_attention, decode_plan, gpu_attention, prompt_attention
from betterhalf.rollout.native.config import DecoderConfig
from betterhalf.rollout.native.fused_parameter import Adapted, Operand
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.mixture import ExpertWeights, mix_experts
from betterhalf.rollout.native.rounding import LayerRounding, Rounding, layer_roundings
from betterhalf.rollout.native.weights import DecoderWeights, LayerWeights

Tap = Callable[[str, int | None, Tensor], Tensor]
"""(name in `OPERATIONS`, layer or None outside layers, result [T, ...]) -> value that the next operation reads."""

OPERATIONS = (
    *("embedding", "attention_norm", "queries", "keys", "values", "rotated_queries", "rotated_keys", "attention"),
    *("attention_output", "attention_residual", "mlp_norm", "gate_up", "swiglu", "down", "mlp_residual", "final_norm"),
)
"""Operations that a tap sees, in the order of computation.

Shapes: heads are [T, heads, D], `gate_up` is [T, 2 * intermediate], everything else [T, width]. Values are in the
container; those of FP32 islands, and of the residual stream after the first of them, are in FP32.
"""

_Mix = Callable[[int, Tensor], Tensor]
"""(layer, projected heads [T, heads + 2 kv_heads, D]) -> [T, heads * D]: everything that mixes positions."""

_Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, D], k and v [T, kv_heads, D]; q and k normed and rotated) -> [T, heads * D]."""

_RopeTable = tuple[Tensor, Tensor]
"""Cosine and sine."""


class _Stream(NamedTuple):
    """The residual stream and the branch to be added to it: the next norm adds and norms in one operation."""

    hidden: Tensor
    """Residual stream [T, hidden]."""
    branch: Tensor | None
    """Branch [T, hidden]; None at the beginning; or FP32 partial sums of it, [parts, T, hidden]."""
    rounding: Rounding
    """Rounding of the sum."""
    operation: tuple[str, int | None]
    """Name of the sum for a tap: (operation, layer)."""

    def only(self, hidden: Tensor) -> _Stream:
        """Return a stream of other values, without a branch."""
        return self._replace(hidden=hidden, branch=None)


class Decoder:
    """Forward pass over given weights; holds no state of any sequence."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, rounding: Rounding, islands: Islands | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.rounding = rounding
        """Rounding of everything outside FP32 islands."""
        self.islands = islands or resolve_islands((), config.num_layers)
        self._layers = layer_roundings(rounding, self.islands)
        self.device: torch.device = weights.norm.device
        """Device of all tensors."""
        self.inv_freqs = [torch.tensor(rope.inv_freq, dtype=torch.float32, device=self.device) for rope in config.ropes]
        """Inverse frequencies of each rope."""
        self.rope_tables: tuple[tuple[_RopeTable, _RopeTable], ...] = (((torch.empty(0),) * 2,) * 2,)
        """For each rope, tables for attention in half and in an FP32 island: cosine and sine, [positions, 1, D] each,
        with D dimensions that are rotated."""
        self.tape = RoutingTape()
        """Record of the experts that routers choose."""
        self.tap: Tap | None = None
        """Function that receives, and may replace, the result of every operation; None in normal use."""

    def reserve(self, max_length: int) -> None:
        """Compute rope tables for positions below `max_length`, unless the present ones are long enough."""
        if self.rope_tables[0][0][0].shape[0] >= max_length:
            return
        positions = torch.arange(max_length, device=self.device)
        self.rope_tables = tuple(
            self._rope_tables(positions[:, None].float() * inv_freq, rope.scaling)
            for inv_freq, rope in zip(self.inv_freqs, self.config.ropes, strict=True)
        )

    def _rope_tables(self, angles: Tensor, scaling: float) -> tuple[_RopeTable, _RopeTable]:
        half = self._rope_table(self.rounding, angles, scaling)
        return half, self._rope_table(self.rounding.in_fp32(), angles, scaling) if self.islands.attention else half

    def _rope_table(self, rounding: Rounding, angles: Tensor, scaling: float) -> _RopeTable:
        cos, sin = rounding.rope_table(angles, scaling, in_fp32=self.config.rope_in_fp32)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    @property
    def rope_dtype(self) -> torch.dtype:
        """dtype of the frequencies from which rope's angles are computed."""
        return self.inv_freqs[0].dtype

    def prefill(self, token_ids: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Run N packed prompts.

        Args:
            token_ids: prompts end to end, int64 [T].
            lengths: tokens of each prompt; they sum to T.

        Returns:
            Final hidden state of each prompt's last token [N, hidden], and keys and values of all tokens
            [layers, 2, T, kv_heads, D].
        """
        config, device = self.config, token_ids.device
        shape = (config.num_layers, 2, token_ids.shape[0], config.num_kv_heads, config.head_dim)
        dtype = torch.promote_types(self.rounding.container, self.rounding.kv_dtype)
        saved = torch.empty(shape, dtype=dtype, device=device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            saved[layer, 0], saved[layer, 1] = k, v
            return prompt_attention(config, self._layers[layer].attention, q, k, v, lengths, layer)

        stream = self._forward(token_ids, self._rotating(_positions(lengths, device), attend))
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        return self._final_norm(stream.only(self._added(stream)[last])), saved

    def hidden_rows(self, token_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return the final hidden states [T, hidden] of all tokens of N packed sequences, computed as in `prefill`."""
        config = self.config

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return prompt_attention(config, self._layers[layer].attention, q, k, v, lengths, layer)

        mix = self._rotating(_positions(lengths, token_ids.device), attend)
        return self._final_norm(self._forward(token_ids, mix))

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: KVCache, attended: int) -> Tensor:
        """Run the next token of the first B slots and append it to the cache.

        Args:
            token_ids: newest token of each slot, int64 [B].
            lengths: tokens already in each slot, int64 [B]; the new one takes this position.
            cache: holds B slots or more.
            attended: number of cached positions to read on a CPU, above every length. A GPU reads what each slot holds.

        Returns:
            Final hidden states [B, hidden].
        """
        if self._uses_kernels(token_ids):
            return self._final_norm(self._forward(token_ids, self._rotating_in_cache(lengths, cache)))
        plan = decode_plan(self.config, self.rounding, cache, lengths, attended)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append(layer, plan.places, k, v)
            return decode_attention(self.config, self._layers[layer].attention, layer, q, plan)

        return self._final_norm(self._forward(token_ids, self._rotating(lengths, attend)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return FP32 logits [B, V]: operands on the half grid, products and sums in FP32, never rounded to half."""
        return self.config.logits.apply_(self._head_product(hidden))

    def _head_product(self, hidden: Tensor) -> Tensor:
        head = self.weights.head
        if head.is_cuda and not self.rounding.exact:
            return torch.mm(hidden, head.t(), out_dtype=torch.float32)
        if self.rounding.tiled:
            return tiled_product(hidden.float(), head)
        return product(hidden.float(), head)

    def _forward(self, token_ids: Tensor, mix: _Mix) -> _Stream:
        rows, config = self.weights.embedding[token_ids], self.config
        rows = self.rounding.embedding(rows, config.embedding_scale, rounds_scale=config.rounds_embedding_scale)
        embedded = self._tapped("embedding", None, rows)
        stream = _Stream(embedded, None, self.rounding, ("embedding", None))
        for index, layer in enumerate(self.weights.layers):
            stream = self._attention(index, layer, stream, mix)
            stream = self._mlp(index, layer, stream)
        return stream

    def _attention(self, index: int, layer: LayerWeights, stream: _Stream, mix: _Mix) -> _Stream:
        part = self._layers[index]
        hidden, normed = self._normed(stream, part.stream_in, part.attention, layer.input_norm)
        normed = self._tapped("attention_norm", index, normed)
        heads = linear(part.attention, normed, layer.qkv, layer.qkv_bias).view(-1, self._heads, self.config.head_dim)
        attended = self._tapped("attention", index, mix(index, heads))
        output = linear(part.output, attended, layer.output, layer.output_bias)
        output = self._after(part.attention_norm, self._tapped("attention_output", index, output), layer.attention_norm)
        return _Stream(hidden, output, part.stream_mid, ("attention_residual", index))

    def _mlp(self, index: int, layer: LayerWeights, stream: _Stream) -> _Stream:
        part, tap = self._layers[index], self._tapped
        hidden, normed = self._normed(stream, part.stream_mid, part.mlp, layer.mlp_norm)
        normed = tap("mlp_norm", index, normed)
        if layer.experts is not None:
            down = tap("down", index, self._mix_experts(index, layer.experts, normed))
            return _Stream(hidden, down, part.stream_out, ("mlp_residual", index))
        gate_up = tap("gate_up", index, linear(part.mlp, normed, layer.gate_up, layer.gate_up_bias))
        activated = tap("swiglu", index, part.mlp.swiglu(gate_up, self.config.activation))
        if isinstance(layer.down, Tensor) and self._adds_parts(part, activated, layer, layer.down):
            down = _in_parts(activated, layer.down)
        else:
            down = tap("down", index, linear(part.down, activated, layer.down, layer.down_bias))
            down = self._after(part.mlp_norm, down, layer.down_norm)
        return _Stream(hidden, down, part.stream_out, ("mlp_residual", index))

    def _mix_experts(self, index: int, weights: ExpertWeights, normed: Tensor) -> Tensor:
        mixture, rounding = self.config.mixture, self._layers[index].mlp
        assert mixture is not None, "a layer has experts, and the decoder has none"
        place = mixture.layers[index]
        assert place is not None, f"layer {index} has no experts"
        return mix_experts(
            normed,
            weights,
            mixture,
            place,
            rounding=rounding,
            project=partial(linear, rounding, bias=None),
            activate=partial(rounding.swiglu, activation=self.config.activation),
            tape=self.tape,
        )

    def _adds_parts(self, part: LayerRounding, activated: Tensor, layer: LayerWeights, down: Tensor) -> bool:
        """Return whether the down projection may leave partial sums for the next norm; not at an island's edge."""
        plain = part.down is part.stream_out is self.rounding and not self.rounding.exact and layer.down_bias is None
        return plain and self._uses_kernels(activated) and _few_tiles(activated, down)

    def _uses_kernels(self, x: Tensor) -> bool:
        """Return whether the fused kernels of a GPU compute what follows `x`."""
        return fused(x) and self.tap is None and self.config.has_kernels

    def _after(self, rounding: Rounding, branch: Tensor, weight: Tensor | None) -> Tensor:
        """Apply the norm of a branch, if there is one."""
        return branch if weight is None else self._rms_norm(rounding, branch, weight)

    def _rms_norm(self, rounding: Rounding, x: Tensor, weight: Tensor) -> Tensor:
        return rounding.rms_norm(x, weight, self.config.rms_eps, self.config.norm_kind)

    def _final_norm(self, stream: _Stream) -> Tensor:
        _, normed = self._normed(stream, self._layers[-1].stream_out, self.rounding, self.weights.norm)
        return self._tapped("final_norm", None, normed)

    def _normed(
        self, stream: _Stream, rounding: Rounding, reader: Rounding, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream with its branch added, and the norm of that sum; the sum itself without a norm.

        A half norm is widened for a reader in an FP32 island; an FP32 norm is rounded once for a reader in half.
        """
        if weight is not None and self._uses_kernels(stream.hidden):
            parts, eps = (stream.hidden, stream.branch), self.config.rms_eps
            return rounding.norm_of_sum_on_gpu(*parts, weight, eps, adder=stream.rounding, reader=reader)
        hidden = self._added(stream)
        normed = hidden if weight is None else self._rms_norm(rounding, hidden, weight)
        return hidden, normed if rounding is reader else reader.round(normed)

    def _added(self, stream: _Stream) -> Tensor:
        hidden, branch, rounding, operation = stream
        if branch is None:
            return hidden
        whole = branch if branch.dim() == hidden.dim() else rounding.round(branch.sum(0))
        return self._tapped(*operation, rounding.add(hidden, whole, self.config.residual_scale))

    @property
    def _heads(self) -> int:
        """Number of heads of queries, keys and values together."""
        return self.config.num_heads + 2 * self.config.num_kv_heads

    def _rotating(self, positions: Tensor, attend: _Attend) -> _Mix:
        """Return attention with the norms and rope of queries and keys before it, as separate operations."""
        config, rope = self.config, self._rope_at(positions)

        def mix(index: int, heads: Tensor) -> Tensor:
            rounding, layer = self._layers[index].attention, self.weights.layers[index]
            qk, v = heads.split_with_sizes([config.num_heads + config.num_kv_heads, config.num_kv_heads], dim=1)
            qk, v = self._tapped_heads(("queries", "keys"), index, qk), self._tapped("values", index, v)
            qk = self._head_normed(rounding, layer, qk)
            which = config.layer_ropes[index]
            if which is not None:
                cos, sin = rope[which][self.islands.layers[index].attention]
                qk = rounding.rope(qk, cos, sin, in_fp32=config.rope_in_fp32)
            q, k = self._apart(self._tapped_heads(("rotated_queries", "rotated_keys"), index, qk))
            return attend(index, q, rounding.to_kv(k), rounding.to_kv(v))

        return mix

    def _head_normed(self, rounding: Rounding, layer: LayerWeights, qk: Tensor) -> Tensor:
        """Norm queries and keys [T, heads + kv_heads, D], each head or all heads of a token; nothing without norms."""
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        whole = self.config.head_norm == "row"
        parts = zip(self._apart(qk), (layer.q_norm, layer.k_norm), strict=True)
        normed = [self._rms_norm(rounding, x.flatten(1) if whole else x, weight).view(x.shape) for x, weight in parts]
        return torch.cat(normed, 1)

    def _rotating_in_cache(self, lengths: Tensor, cache: KVCache) -> _Mix:
        """Return attention for one new token of each slot on a GPU: one kernel norms, rotates and writes the cache."""
        # Imported here because it needs Triton, which only a GPU requires.
        from betterhalf.kernels.decoding import rotate_and_append

        config = self.config

        def mix(index: int, heads: Tensor) -> Tensor:
            rounding, layer = self._layers[index].attention, self.weights.layers[index]
            norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
            queries = rotate_and_append(
                heads,
                self.rope_tables[0][self.islands.layers[index].attention],
                lengths,
                norms,
                cache.rows(index),
                config.rms_eps,
                kv_heads=config.num_kv_heads,
                aligned=rounding.aligned,
            )
            return gpu_attention(config, queries, cache.rows(index), lengths, config.windows[index])

        return mix

    def _rope_at(self, positions: Tensor) -> list[tuple[_RopeTable, _RopeTable]]:
        """Select the rows of `rope_tables` at these positions, [T, 1, D] each."""
        selected = []
        for half, wide in self.rope_tables:
            rows = _rows(half, positions)
            selected.append((rows, rows if wide is half else _rows(wide, positions)))
        return selected

    def _tapped(self, operation: str, layer: int | None, value: Tensor) -> Tensor:
        return value if self.tap is None else self.tap(operation, layer, value)

    def _apart(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Split queries and keys, which are rotated together, into views."""
        q, k = qk.split_with_sizes([self.config.num_heads, self.config.num_kv_heads], dim=1)
        return q, k

    def _tapped_heads(self, operations: tuple[str, str], layer: int, qk: Tensor) -> Tensor:
        if self.tap is None:
            return qk
        both = zip(operations, self._apart(qk), strict=True)
        return torch.cat([self._tapped(operation, layer, x) for operation, x in both], 1)


def _rows(table: _RopeTable, positions: Tensor) -> _RopeTable:
    cos, sin = table
    return cos[positions], sin[positions]


def _positions(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the position of each token in its sequence, int64 [T]."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])


_PARTS = 4
"""Number of parts of a long sum, computed in parallel."""
_LONG_SUM = 4096
"""Minimum number of terms for which parts are faster."""
_TILE = 64
"""Rows, and columns, of the smallest part of a product that one multiprocessor computes."""


def _few_tiles(x: Tensor, weight: Tensor) -> bool:
    """Return whether a product on a GPU has long sums and too few results to keep all multiprocessors busy."""
    if not fused(x) or x.shape[1] < _LONG_SUM or x.shape[1] % (16 * _PARTS):
        return False
    tiles = -(-x.shape[0] // _TILE) * -(-weight.shape[0] // _TILE)
    return tiles <= torch.cuda.get_device_properties(x.device).multi_processor_count


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `x @ weight^T` as partial sums over the width, float32 [parts, T, out]; the reader adds them."""
    left, right = (y.view(y.shape[0], _PARTS, -1).transpose(0, 1) for y in (x, weight))
    return torch.bmm(left, right.transpose(1, 2), out_dtype=torch.float32)


def linear(rounding: Rounding, x: Tensor, weight: Operand, bias: Tensor | None) -> Tensor:
    """Project rows `x`, [T, in] -> [T, out], and round the result; an FP32 island does not round."""
    if isinstance(weight, Adapted):
        base = linear(rounding, x, weight.weight, bias)
        return weight.adapters.add(rounding, x, base, lambda rows, right: linear(rounding, rows, right, None))
    if rounding.tiled:
        parts = weight if isinstance(weight, tuple) else (weight,)
        out = torch.cat([tiled_product(x.float(), part) for part in parts], 1)
        return rounding.round(out if bias is None else out + bias)
    assert isinstance(weight, Tensor)
    out = product(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, bias)
    return rounding.round(out) if rounding.rounds_products else out
