"""A matrix that every rank holds whole, while its FP32 master is sharded: the LM head, and an embedding tied to it.

The head is used outside the decoder's forward pass, where FSDP2 gathers nothing. It is gathered once for each policy
version, and its gradient is added in FP32 over all passes and reduced over the ranks once for each optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.training.weights.rows import add_over_ranks, gather_rows, padded
from betterhalf.training.weights.sums import collect_into


class WholeMatrix:
    """FP32 master rows of this rank, the whole matrix in the compute dtype, and the FP32 sum of its gradients."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        rows: ShardRange,
        *,
        world_size: int,
        device: torch.device,
        offload: bool,
        trained: bool = True,
    ) -> None:
        """Allocate the master, which the caller fills, and the whole matrix, which `gather` fills.

        Args:
            name: of the parameter, [V, H].
            dtype: of the computation.
            rows: those of this rank.
            world_size: number of ranks.
            device: of the computation.
            offload: keep the master in host memory.
            trained: False for a frozen matrix, which gets no gradient.
        """
        self.name, self.rows = name, rows
        self._world_size, self._device = world_size, device
        place = torch.device("cpu") if offload else device
        self.master = nn.Parameter(torch.empty(rows.count, *rows.shape[1:], device=place))
        self.leaf = nn.Parameter(torch.zeros(rows.shape, dtype=dtype, device=device), requires_grad=trained)
        """Whole matrix in the compute dtype, which the module computes with."""
        self._padded = padded(rows, world_size, self._device) if trained else torch.empty(0)
        self._total = self._padded[: rows.shape[0]]
        """FP32 sum of this rank's gradients; its content is stale unless `_collected` names the matrix."""
        self._collected: set[str] = set()
        self._adds_itself = dtype == torch.float32
        """True if autograd adds to the sum, as the leaf's gradient."""
        if trained:
            self._collect(self.leaf)

    def _collect(self, leaf: nn.Parameter) -> None:
        if self._adds_itself:
            leaf.grad = self._total
        else:
            total = self._total
            collect_into(lambda: total, leaf, self.name, self._collected)

    def second_use(self) -> nn.Parameter:
        """Return another leaf on the whole matrix, whose gradient goes to the same sum; itself if it is frozen."""
        if not self.leaf.requires_grad:
            return self.leaf
        alias = nn.Parameter(self.leaf.detach())
        self._collect(alias)
        return alias

    @torch.no_grad()
    def gather(self, local: Tensor) -> None:
        """Compute with `local`, float32 rows of this rank, rounded once; collective."""
        # `copy_` counts as a change of the leaf, by which widened copies are refreshed.
        self.leaf.copy_(gather_rows(local.to(self.leaf.dtype), self.rows, self._world_size, self._device))

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Return the master's gradient, float32, with what all ranks have added since the last call; collective."""
        if not self._adds_itself and not self._collected:
            self._total.zero_()
        added = add_over_ranks(self._padded, self.rows, self._world_size).to(self.master.device)
        self.master.grad = added if self.master.grad is None else self.master.grad.add_(added)
        self._forget_sum()
        return self.master.grad

    def zero_grad(self) -> None:
        """Discard every gradient."""
        self.master.grad = None
        self._forget_sum()

    def _forget_sum(self) -> None:
        self._collected.clear()
        if self._adds_itself:
            self._total.zero_()
