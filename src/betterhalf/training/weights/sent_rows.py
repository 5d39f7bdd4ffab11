"""Rows of weights that cannot be read in parts, such as those of a GGUF file.

Rank 0 loads them whole into its host memory, and sends every rank its rows, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from betterhalf.distributed.group import GroupCollective
from betterhalf.distributed.shard_range import ShardRange
from betterhalf.training.weights.rows import scatter_rows


class SentRows:
    """Parameters of the module that rank 0 has loaded; implements `RowSource`. Reading it is collective."""

    def __init__(self, ranks: GroupCollective, module: Any | None) -> None:
        """Send from `module`, the loaded module on rank 0; None on every other rank."""
        assert (module is None) == (ranks.rank != 0), "rank 0 alone has the module"
        self._ranks = ranks
        self._whole: Mapping[str, Tensor] = {} if module is None else dict(module.named_parameters())
        self._buffers: Mapping[str, Tensor] = {} if module is None else dict(module.named_buffers())

    def rows(self, wanted: Mapping[str, ShardRange]) -> Iterator[tuple[str, Tensor]]:
        """See `RowSource.rows`; tensors are sent one at a time."""
        for name, rows in wanted.items():
            whole = self._whole[name].detach() if self._whole else None
            yield name, scatter_rows(whole, rows, self._ranks.world_size, self._ranks.device)

    def send_buffers(self, module: nn.Module) -> None:
        """Give the buffers of a skeleton on every rank the values that rank 0 has read or computed."""
        for name, buffer in module.named_buffers():
            sent = self._buffers.get(name, buffer).to(self._ranks.device).contiguous()
            dist.broadcast(sent, src=0)
            buffer.copy_(sent)
