"""Keys and values of the sequences being decoded, one slot for each; active slots lie at the front.

Values lie on the grid of `kv_dtype`. On a CPU they are stored in FP32, because attention multiplies them in FP32 and
widening the whole cache at every token would cost more than reading twice the bytes; on a GPU in `kv_dtype` itself.
On a CPU the numbers of one key lie `max_length` apart: products with a few queries then read whole rows, which takes
little more than half the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf.rollout.native.config import DecoderConfig


class KVCache:
    """Keys and values of all layers, each seen as [layers, slots, kv_heads, max_length, head_dim]."""

    def __init__(
        self, config: DecoderConfig, *, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = [config.num_layers, slots, config.num_kv_heads, max_length, config.head_dim]
        # Zeros, not garbage: what lies beyond a sequence's length is multiplied by probability 0 and must be finite.
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = torch.zeros_like(self.values)
        if device.type == "cpu":
            self.keys = self.keys.view(*shape[:3], config.head_dim, max_length).transpose(3, 4)
        # One view for each layer, [slots * kv_heads, max_length, D]: made once, because each costs as much as a kernel.
        self._rows = tuple(zip(self.keys.flatten(1, 2).unbind(), self.values.flatten(1, 2).unbind(), strict=True))
        self._heads = torch.arange(slots * config.num_kv_heads, device=device)

    @property
    def slots(self) -> int:
        """Sequences it can hold."""
        return int(self.values.shape[1])

    @property
    def max_length(self) -> int:
        """Tokens it can hold of each."""
        return int(self.values.shape[3])

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [slots * kv_heads, max_length, D] each."""
        return self._rows[layer]

    def places(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """For `append`, where the next token of the first B slots goes, int64 [B * kv_heads] each: head, position."""
        positions = lengths.repeat_interleave(self.values.shape[2])
        return self._heads[: positions.shape[0]], positions

    def append(self, layer: int, places: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Write one token for each of B slots: keys and values [B, kv_heads, D]."""
        for held, x in zip(self._rows[layer], (keys, values), strict=True):
            held.index_put_(places, x.flatten(0, 1).to(held.dtype))

    def read(self, slots: int, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values of the first slots for each layer, without copying: two of [slots * kv_heads, length, D]."""
        held = (x.flatten(1, 2)[:, : slots * x.shape[2], :length].unbind() for x in (self.keys, self.values))
        return tuple(zip(*held, strict=True))

    def fill(self, start: int, stop: int, prefix: Tensor) -> None:
        """Give slots [start, stop) the same prompt: prefix [layers, 2 (keys, values), length, kv_heads, D]."""
        length = prefix.shape[2]
        for held, x in ((self.keys, prefix[:, 0]), (self.values, prefix[:, 1])):
            held[:, start:stop, :, :length].copy_(x.transpose(1, 2).unsqueeze(1))

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` tokens of some slots to others: int64 [N] each."""
        for held in (self.keys, self.values):
            part = held[:, :, :, :length]
            part[:, targets] = part[:, sources]
