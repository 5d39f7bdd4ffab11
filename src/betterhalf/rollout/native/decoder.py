"""The decoder itself: prompts in one packed pass, then one token for each active slot. T packed tokens, B slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from betterhalf.precision.islands import Islands, resolve_islands
from betterhalf.precision.products import product
from betterhalf.rollout.native.attention import decode_attention, decode_plan, prompt_attention
from betterhalf.rollout.native.config import DecoderConfig
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.rounding import Rounding, layer_roundings
from betterhalf.rollout.native.weights import DecoderWeights, LayerWeights

Tap = Callable[[str, int | None, Tensor], Tensor]
"""(operation of `OPERATIONS`, layer or None outside of layers, its result [T, ...]) -> what the next one reads."""

OPERATIONS = (
    *("embedding", "attention_norm", "queries", "keys", "values", "rotated_queries", "rotated_keys", "attention"),
    *("attention_output", "attention_residual", "mlp_norm", "gate_up", "swiglu", "down", "mlp_residual", "final_norm"),
)
"""Every operation that a tap sees, in the order of computation. Shapes: heads are [T, heads, D], `gate_up` is
[T, 2 * intermediate], everything else [T, width]. Values are in the container, those of FP32 islands and of the
residual stream behind them in FP32."""

_Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, D], k, v [T, kv_heads, D]) -> [T, heads * D]."""

_RopeTable = tuple[Tensor, Tensor]
"""Cosine and sine."""


class Decoder:
    """Forward pass over the weights it was given; it holds no state of any sequence."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, rounding: Rounding, islands: Islands | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.rounding = rounding
        """Of everything outside FP32 islands."""
        self.islands = islands or resolve_islands((), config.num_layers)
        self._layers = layer_roundings(rounding, self.islands)
        self.inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device=weights.norm.device)
        self.rope_tables: tuple[_RopeTable, _RopeTable] = ((torch.empty(0),) * 2,) * 2
        """For attention in half, and in an FP32 island; each [positions, 1, D]."""
        self.tap: Tap | None = None
        """Sees, and may replace, the result of every operation; None in normal use."""

    def reserve(self, max_length: int) -> None:
        """Make rope tables for positions below `max_length`; longer ones replace shorter ones."""
        if self.rope_tables[0][0].shape[0] >= max_length:
            return
        positions = torch.arange(max_length, device=self.inv_freq.device)
        angles = positions[:, None].float() * self.inv_freq
        half = self._rope_table(self.rounding, angles)
        self.rope_tables = half, self._rope_table(self.rounding.in_fp32(), angles) if self.islands.attention else half

    def _rope_table(self, rounding: Rounding, angles: Tensor) -> _RopeTable:
        cos, sin = rounding.rope_table(angles, self.config.rope_scaling)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    @property
    def rope_dtype(self) -> torch.dtype:
        """dtype of the frequencies that rope's angles are computed from."""
        return self.inv_freq.dtype

    def prefill(self, token_ids: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Run N packed prompts.

        Args:
            token_ids: int64 [T], prompts end to end.
            lengths: of each prompt; sum to T.

        Returns:
            Final hidden state of each prompt's last token [N, hidden], and its keys and values
            [layers, 2, T, kv_heads, D].
        """
        config, device = self.config, token_ids.device
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        shape = (config.num_layers, 2, token_ids.shape[0], config.num_kv_heads, config.head_dim)
        dtype = torch.promote_types(self.rounding.container, self.rounding.kv_dtype)
        saved = torch.empty(shape, dtype=dtype, device=device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            saved[layer, 0], saved[layer, 1] = k, v
            return prompt_attention(config, self._layers[layer].attention, q, k, v, lengths, config.windows[layer])

        hidden = self._forward(token_ids, positions, attend)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        return self._final_norm(hidden[last]), saved

    def hidden_rows(self, token_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Final hidden states [T, hidden] of all rows of N packed sequences, computed as `prefill` does."""
        config = self.config
        positions = torch.cat([torch.arange(length, device=token_ids.device) for length in lengths])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return prompt_attention(config, self._layers[layer].attention, q, k, v, lengths, config.windows[layer])

        return self._final_norm(self._forward(token_ids, positions, attend))

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: KVCache, attended: int) -> Tensor:
        """Run the next token of the first B slots and append it to the cache.

        Args:
            token_ids: int64 [B].
            lengths: int64 [B], tokens already in each slot; the new one takes this position.
            cache: holds B slots or more.
            attended: cached positions to read; above every length.

        Returns:
            Final hidden states [B, hidden].
        """
        plan = decode_plan(self.config, cache, lengths, attended)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append(layer, plan.places, k, v)
            mask = plan.masks[self.config.windows[layer]]
            return decode_attention(self.config, self._layers[layer].attention, q, *plan.held[layer], mask)

        return self._final_norm(self._forward(token_ids, lengths, attend))

    def logits(self, hidden: Tensor) -> Tensor:
        """FP32 logits [B, V]: operands on the half grid, products and sums in FP32, never rounded to half."""
        head = self.weights.head
        if head.is_cuda and not self.rounding.exact:
            return torch.mm(hidden, head.t(), out_dtype=torch.float32)
        return product(hidden.float(), head)

    def _forward(self, token_ids: Tensor, positions: Tensor, attend: _Attend) -> Tensor:
        hidden = self._tapped("embedding", None, self.weights.embedding[token_ids].to(self.rounding.container))
        rope = self._rope_at(positions)
        for index, layer in enumerate(self.weights.layers):
            hidden = self._attention(index, layer, hidden, rope[self.islands.layers[index].attention], attend)
            hidden = self._mlp(index, layer, hidden)
        return hidden

    def _rope_at(self, positions: Tensor) -> tuple[_RopeTable, _RopeTable]:
        """`rope_tables`, each [T, 1, D]."""
        (cos, sin), (cos_wide, sin_wide) = self.rope_tables
        half = cos[positions], sin[positions]
        return half, (cos_wide[positions], sin_wide[positions]) if self.islands.attention else half

    def _tapped(self, operation: str, layer: int | None, value: Tensor) -> Tensor:
        return value if self.tap is None else self.tap(operation, layer, value)

    def _attention(self, index: int, layer: LayerWeights, hidden: Tensor, rope: _RopeTable, attend: _Attend) -> Tensor:
        part, config, tap = self._layers[index], self.config, self._tapped
        rounding = part.attention
        normed = tap("attention_norm", index, self._norm(part.stream_in, rounding, hidden, layer.input_norm))
        heads = _linear(rounding, normed, layer.qkv, layer.qkv_bias).view(hidden.shape[0], -1, config.head_dim)
        qk, v = heads.split_with_sizes([config.num_heads + config.num_kv_heads, config.num_kv_heads], dim=1)
        qk, v = self._tapped_heads(("queries", "keys"), index, qk), tap("values", index, v)
        if layer.q_norm is not None and layer.k_norm is not None:
            weights, parts = (layer.q_norm, layer.k_norm), self._apart(qk)
            normed_heads = [rounding.rms_norm(x, w, config.rms_eps) for x, w in zip(parts, weights, strict=True)]
            qk = torch.cat(normed_heads, 1)
        qk = self._tapped_heads(("rotated_queries", "rotated_keys"), index, rounding.rope(qk, *rope))
        q, k = self._apart(qk)
        attended = tap("attention", index, attend(index, q, rounding.to_kv(k), rounding.to_kv(v)))
        output = tap("attention_output", index, _linear(part.output, attended, layer.output, layer.output_bias))
        return tap("attention_residual", index, part.stream_mid.add(hidden, output))

    def _apart(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, which share rope's few calls, as views."""
        q, k = qk.split_with_sizes([self.config.num_heads, self.config.num_kv_heads], dim=1)
        return q, k

    def _tapped_heads(self, operations: tuple[str, str], layer: int, qk: Tensor) -> Tensor:
        if self.tap is None:
            return qk
        both = zip(operations, self._apart(qk), strict=True)
        return torch.cat([self._tapped(operation, layer, x) for operation, x in both], 1)

    def _mlp(self, index: int, layer: LayerWeights, hidden: Tensor) -> Tensor:
        part, tap = self._layers[index], self._tapped
        normed = tap("mlp_norm", index, self._norm(part.stream_mid, part.mlp, hidden, layer.mlp_norm))
        gate_up = tap("gate_up", index, _linear(part.mlp, normed, layer.gate_up, layer.gate_up_bias))
        activated = tap("swiglu", index, part.mlp.swiglu(gate_up))
        down = tap("down", index, _linear(part.down, activated, layer.down, layer.down_bias))
        return tap("mlp_residual", index, part.stream_out.add(hidden, down))

    def _final_norm(self, hidden: Tensor) -> Tensor:
        stream = self._layers[-1].stream_out
        return self._tapped("final_norm", None, self._norm(stream, self.rounding, hidden, self.weights.norm))

    def _norm(self, stream: Rounding, reader: Rounding, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of the residual stream; a half result is widened for an island, an FP32 one rounded once for half."""
        normed = stream.rms_norm(hidden, weight, self.config.rms_eps)
        return normed if stream is reader else reader.round(normed)


def _linear(rounding: Rounding, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection whose result is rounded once: by the half kernel itself, or after sums in FP32; not in an island."""
    out = product(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, bias)
    return rounding.round(out) if rounding.widened else out
