"""Keys and values of the sequences being decoded, one slot for each sequence; active slots come first.

Values are on the grid of `kv_dtype`. On a CPU they are stored in FP32, because attention multiplies them in FP32 and
widening the whole cache at every token would cost more than reading twice the bytes; on a GPU in `kv_dtype` itself.
On a CPU the elements of one key are `max_length` apart in memory, so that products with a few queries read whole rows,
which takes little more than half the time. For tiled attention, keys are stored like values, in whole tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf.models.tiled_attention import KEYS
from betterhalf.rollout.native.config import DecoderConfig


class KVCache:
    """Keys and values of all layers, both with the shape [layers, slots, kv_heads, max_length, head_dim]."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        tiled: bool = False,
    ) -> None:
        """Allocate; with `tiled`, for `models.tiled_attention.decode_tiles`."""
        if tiled:
            max_length = -(-max_length // KEYS) * KEYS
        shape = [config.num_layers, slots, config.num_kv_heads, max_length, config.head_dim]
        # Zeros, because positions beyond a sequence's length are multiplied by probability 0 and must be finite.
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = torch.zeros_like(self.values)
        if device.type == "cpu" and not tiled:
            self.keys = self.keys.view(*shape[:3], config.head_dim, max_length).transpose(3, 4)
        # One view per layer, [slots * kv_heads, max_length, D], made once: making a view costs as much as a kernel.
        self._rows = tuple(zip(self.keys.flatten(1, 2).unbind(), self.values.flatten(1, 2).unbind(), strict=True))
        self._heads = torch.arange(slots * config.num_kv_heads, device=device)

    @property
    def slots(self) -> int:
        """Number of sequences it can hold."""
        return int(self.values.shape[1])

    @property
    def max_length(self) -> int:
        """Number of tokens it can hold of each sequence."""
        return int(self.values.shape[3])

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, [slots * kv_heads, max_length, D] each."""
        return self._rows[layer]

    def places(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices (head, position) of the next token of the first B slots, int64 [B * kv_heads] each."""
        positions = lengths.repeat_interleave(self.values.shape[2])
        return self._heads[: positions.shape[0]], positions

    def append(self, layer: int, places: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Write keys and values [B, kv_heads, D] of one token of B slots to the indices that `places` returned."""
        for held, x in zip(self._rows[layer], (keys, values), strict=True):
            held.index_put_(places, x.flatten(0, 1).to(held.dtype))

    def read(self, slots: int, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return views of each layer's keys and values in the first slots, [slots * kv_heads, length, D] each."""
        held = (x.flatten(1, 2)[:, : slots * x.shape[2], :length].unbind() for x in (self.keys, self.values))
        return tuple(zip(*held, strict=True))

    def fill(self, start: int, stop: int, prefix: Tensor) -> None:
        """Copy a prompt to the slots [start, stop): prefix [layers, 2 (keys, values), length, kv_heads, D]."""
        length = prefix.shape[2]
        for held, x in ((self.keys, prefix[:, 0]), (self.values, prefix[:, 1])):
            held[:, start:stop, :, :length].copy_(x.transpose(1, 2).unsqueeze(1))

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` tokens of the slots `sources` to the slots `targets`, int64 [N] each."""
        for held in (self.keys, self.values):
            part = held[:, :, :, :length]
            part[:, targets] = part[:, sources]
