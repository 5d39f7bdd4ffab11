"""Logprobs and entropy of completion tokens from final hidden states, in FP32, a chunk of rows at a time.

No [tokens, vocabulary] tensor is ever alive: rows are processed in chunks that fit a memory budget, and the backward
pass computes a chunk's logits again. Operands of the head are on the half grid; logits and softmax are FP32
(MiniMax-M1, arXiv 2506.13585, traced its gap between engines to the precision of the head). The logits' gradient is
FP32 on a CPU; on a GPU it is rounded to half for its products, whose sums are FP32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.precision.products import product


def rows_per_chunk(vocabulary: int, logits_mib: int) -> int:
    """How many rows of FP32 logits fit the budget; at least one."""
    return max(1, logits_mib * 2**20 // (4 * vocabulary))


class _TokenLogprobs(torch.autograd.Function):
    """[C, H] hidden, [V, H] head -> [C] logprobs, with logits recomputed chunk by chunk in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        wide_VH: Tensor,
        targets_C: Tensor,
        temperature: float,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden_CH, weight_VH, wide_VH, targets_C)
        ctx.temperature, ctx.rows = temperature, rows
        out = [
            ops.token_logprobs(head_logits(hidden, wide_VH), targets, temperature)
            for hidden, targets in zip(torch.split(hidden_CH, rows), torch.split(targets_C, rows), strict=True)
        ]
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden_CH, weight_VH, wide_VH, targets_C = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_CH)
        grad_weight = torch.zeros_like(wide_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_CH.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            grad_logits = _grad_logits(
                head_logits(hidden_CH[part], wide_VH), targets_C[part], grad_outputs[0][part], ctx.temperature
            )
            grad_hidden[part] = _product(grad_logits, wide_VH)
            if grad_weight is not None:
                grad_weight += _product(grad_logits.t(), hidden_CH[part].to(wide_VH.dtype))
        rounded = None if grad_weight is None else grad_weight.to(weight_VH.dtype)
        return grad_hidden, rounded, None, None, None, None


def head_logits(hidden_CH: Tensor, wide_VH: Tensor) -> Tensor:
    """FP32 logits. On a GPU half operands with FP32 sums and results; on a CPU the widened operands' FP32 product."""
    if hidden_CH.dtype == wide_VH.dtype == torch.float32 or not hidden_CH.is_cuda:
        return product(hidden_CH.float(), wide_VH)
    return torch.mm(hidden_CH, wide_VH.t(), out_dtype=torch.float32)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """FP32 left times right; on a GPU with a half right the left is rounded to it, and sums stay FP32."""
    if right.dtype == torch.float32:
        return product(left, right.t())
    return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)


def _grad_logits(logits_CV: Tensor, targets_C: Tensor, grad_C: Tensor, temperature: float) -> Tensor:
    """Gradient of the chosen logprobs with respect to the logits: (onehot - softmax) * grad / temperature."""
    grad = torch.softmax(logits_CV / temperature, dim=-1)
    grad.mul_(-grad_C.unsqueeze(-1))
    grad.scatter_add_(1, targets_C.unsqueeze(-1), grad_C.unsqueeze(-1))
    return grad.div_(temperature) if temperature != 1.0 else grad


def token_logprobs(
    hidden_CH: Tensor, weight_VH: Tensor, wide_VH: Tensor, targets_C: Tensor, temperature: float, rows: int
) -> Tensor:
    """Differentiable logprobs of the targets.

    Args:
        hidden_CH: final hidden states of the loss rows, in the compute dtype.
        weight_VH: the head's weight, in the compute dtype; receives the gradient, rounded once.
        wide_VH: the same values as the products use them: widened to FP32 on a CPU, `weight_VH` itself on a GPU.
        targets_C: int64 token ids.
        temperature: logits are divided by this.
        rows: rows of logits alive at once; see `rows_per_chunk`.

    Returns:
        float32 [C].
    """
    out = _TokenLogprobs.apply(hidden_CH, weight_VH, wide_VH, targets_C, temperature, rows)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


@torch.no_grad()
def measure_tokens(
    hidden_CH: Tensor, wide_VH: Tensor, targets_C: Tensor, temperature: float, rows: int
) -> tuple[Tensor, Tensor]:
    """Logprobs of the targets and entropy of their distributions, both float32 [C], without gradients.

    The logprobs equal those of `token_logprobs` bit for bit: same chunks, same products.
    """
    logprobs, entropies = [], []
    for hidden, targets in zip(torch.split(hidden_CH, rows), torch.split(targets_C, rows), strict=True):
        logits = head_logits(hidden, wide_VH)
        logprobs.append(ops.token_logprobs(logits, targets, temperature))
        entropies.append(ops.entropy(logits, temperature))
    return torch.cat(logprobs), torch.cat(entropies)
