"""Keys and values of the sequences being decoded, one slot for each; active slots lie at the front.

Values lie on the grid of `kv_dtype`. On a CPU they are stored in FP32, because attention multiplies them in FP32 and
widening the whole cache at every token would cost more than reading twice the bytes; on a GPU in `kv_dtype` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf.rollout.native.config import DecoderConfig


class KVCache:
    """[layers, 2 (keys, values), slots, kv_heads, max_length, head_dim]."""

    def __init__(
        self, config: DecoderConfig, *, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, slots, config.num_kv_heads, max_length, config.head_dim)
        # Zeros, not garbage: what lies beyond a sequence's length is multiplied by probability 0 and must be finite.
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._first_rows = torch.arange(slots * config.num_kv_heads, device=device) * max_length

    @property
    def slots(self) -> int:
        """Sequences it can hold."""
        return int(self.data.shape[2])

    @property
    def max_length(self) -> int:
        """Tokens it can hold of each."""
        return int(self.data.shape[4])

    def rows(self, lengths: Tensor) -> Tensor:
        """Where the next token of the first B slots goes: int64 [B] lengths -> [B * kv_heads] rows for `append`."""
        kv_heads = self.data.shape[3]
        return self._first_rows[: lengths.shape[0] * kv_heads] + lengths.repeat_interleave(kv_heads)

    def append(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write one token for each of B slots: keys and values [B, kv_heads, D]."""
        for which, x in enumerate((keys, values)):
            flat = self.data[layer, which].view(-1, x.shape[-1])
            flat.index_copy_(0, rows, x.reshape(-1, x.shape[-1]).to(flat.dtype))

    def read(self, layer: int, slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots, without copying: two of [slots * kv_heads, length, D]."""
        keys, values = (self.data[layer, which, :slots].flatten(0, 1)[:, :length] for which in (0, 1))
        return keys, values

    def fill(self, start: int, stop: int, prefix: Tensor) -> None:
        """Give slots [start, stop) the same prompt: prefix [layers, 2, length, kv_heads, D]."""
        length = prefix.shape[2]
        self.data[:, :, start:stop, :, :length].copy_(prefix.transpose(2, 3).unsqueeze(2))

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` tokens of some slots to others: int64 [N] each."""
        part = self.data[:, :, :, :, :length]
        part[:, :, targets] = part[:, :, sources]
