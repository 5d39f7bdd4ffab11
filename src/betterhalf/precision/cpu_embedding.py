"""Embeddings on a CPU with a sparse gradient, summed in FP32 and rounded once.

torch's CPU backward pass of an embedding adds the gradients of equal tokens sequentially in their own dtype: in FP16 a
sum of ones stops at 2048, in BF16 at 256. A token occurs hundreds of times in a pack, so gradient bits are lost. In
FP32 nothing is lost, but a dense gradient of the whole vocabulary is built and added although only a few hundred rows
are non-zero.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from betterhalf.precision.roles import Precision


class _CpuEmbeddingFunction(torch.autograd.Function):
    """weight [V, H], token ids [...] -> [..., H]; each row of the gradient is an FP32 sum, rounded once."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, token_ids: Tensor, padding_idx: int | None, sparse: bool) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.shape, ctx.dtype, ctx.padding_idx, ctx.sparse = weight_VH.shape, weight_VH.dtype, padding_idx, sparse
        return F.embedding(token_ids, weight_VH)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (token_ids,) = ctx.saved_tensors
        rows = grad_outputs[0].reshape(-1, ctx.shape[1]).float()
        present, place = token_ids.reshape(-1).unique(return_inverse=True)
        total = torch.zeros(present.shape[0], ctx.shape[1], dtype=torch.float32, device=rows.device)
        total.index_add_(0, place, rows)
        if ctx.padding_idx is not None:
            total[present == ctx.padding_idx] = 0
        if not ctx.sparse:
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=rows.device)
            grad[present] = total.to(ctx.dtype)
            return grad, None, None, None
        # Sparse, since a pack uses only a few hundred rows: a dense gradient would be written and read in full.
        # No check of the indices: they are tokens that were looked up, so they are in range.
        with torch.sparse.check_sparse_tensor_invariants(enable=False):  # type: ignore[no-untyped-call]
            grad = torch.sparse_coo_tensor(present[None], total.to(ctx.dtype), ctx.shape)
        return grad, None, None, None


class CpuEmbedding(nn.Module):
    """Replacement for an embedding on a CPU, half or FP32: same parameter, name, padding rule and scale."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Take over the parameter of `embedding`, without a copy."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.scale = embedding_scale(embedding)
        """Factor of the result, rounded to the weight's dtype (Gemma 3)."""
        self.weight = embedding.weight
        self.sparse = True
        """False for a dense gradient, which FSDP2 needs."""

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look up int64 [...] and return [..., H] in the weight's dtype."""
        out = _CpuEmbeddingFunction.apply(self.weight, token_ids, self.padding_idx, self.sparse)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out if self.scale == 1.0 else out * torch.tensor(self.scale).to(self.weight.dtype)


def has_rule(part: nn.Module) -> TypeGuard[nn.Embedding]:
    """Return whether a module is an embedding whose result this module computes: plain, or multiplied by a number."""
    return type(part) is nn.Embedding or isinstance(getattr(part, "scalar_embed_scale", None), float)


def embedding_scale(embedding: nn.Embedding) -> float:
    """Return the factor by which an embedding for which `has_rule` is true multiplies its rows."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def use_cpu_embedding(module: nn.Module, precision: Precision) -> int:
    """Replace, in place, every embedding inside `module` for which `has_rule` is true, on a CPU.

    Its parameter may get the compute dtype later.

    Returns:
        Number of embeddings replaced; 0 on a GPU, whose kernel sums in FP32.
    """
    if precision.device.type != "cpu":
        return 0
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if has_rule(child):
                setattr(parent, name, CpuEmbedding(child))
                count += 1
    return count
