"""Logprobs of several tokens of each row, for Score Centering: the engine's most likely ones.

Like `training.token_scores`, but for K different tokens in each row, in a pass of its own: the head's product is
computed once more, and only in runs that ask for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.precision.products import add_product, direct_sum
from betterhalf.training.token_scores import Head, LogitsWorkspace, _product, head_logits


class _TopLogprobs(torch.autograd.Function):
    """[C, H] hidden, [V, H] head, [C, K] token ids -> [C, K] logprobs; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        head: Head,
        top_ids_CK: Tensor,
        temperature: float,
        workspace: LogitsWorkspace,
    ) -> Tensor:
        rows, parts = workspace.rows(head.logits_weight.shape[0]), []
        for hidden, ids in zip(torch.split(hidden_CH, rows), torch.split(top_ids_CK, rows), strict=True):
            logits = workspace.multiply(hidden, head.logits_weight, head.tiled_weight, head.transform)
            _, normaliser = ops.normalised(logits, ids[:, 0], temperature)
            top = logits.gather(-1, ids)
            parts.append(((top if temperature == 1.0 else top / temperature) - normaliser.unsqueeze(-1), normaliser))
        top_CK, normaliser_C = (torch.cat(columns) for columns in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_CH, head.logits_weight, head.grad_weight, top_ids_CK, normaliser_C)
        ctx.weight_VH, ctx.temperature, ctx.workspace = weight_VH, temperature, workspace
        ctx.transform = head.transform
        return top_CK

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_CH, logits_weight_VH, grad_weight_VH, top_ids_CK, normaliser_C = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden_CH.shape, dtype=torch.float32, device=hidden_CH.device)
        total = direct_sum(ctx.weight_VH) if ctx.needs_input_grad[1] else None
        alone = ctx.needs_input_grad[1] and total is None
        grad_VH = torch.empty_like(grad_weight_VH, dtype=hidden_CH.dtype) if alone else None
        columns = ctx.workspace.columns(hidden_CH.shape[0], on_cpu=hidden_CH.is_cpu)
        grad_CK, operand = grad_outputs[0] / ctx.temperature, hidden_CH.to(grad_weight_VH.dtype)
        for start in range(0, grad_weight_VH.shape[0], columns):
            part = slice(start, start + columns)
            logits = ctx.transform.apply_(head_logits(hidden_CH, logits_weight_VH[part]))
            scaled = logits if ctx.temperature == 1.0 else logits / ctx.temperature
            grad_logits = _grad_logits(scaled, top_ids_CK - start, normaliser_C, grad_CK)
            grad_logits = ctx.transform.backward(grad_logits, logits).to(grad_weight_VH.dtype)
            grad_hidden += _product(grad_logits, grad_weight_VH[part])
            if total is not None:
                add_product(total[part], grad_logits.t(), operand.t())
            elif grad_VH is not None:
                grad_VH[part] = ctx.workspace.multiply_back(grad_logits.t(), operand)
        return grad_hidden.to(hidden_CH.dtype), grad_VH, None, None, None, None


def _grad_logits(scaled_CV: Tensor, top_ids_CK: Tensor, normaliser_C: Tensor, grad_CK: Tensor) -> Tensor:
    """Return the gradient of the logprobs with respect to the scaled logits: sum over K of (onehot - softmax) * grad.

    `top_ids_CK` are relative to the first of these logits; a token may be outside them.
    """
    grad = (scaled_CV - normaliser_C.unsqueeze(-1)).exp_().mul_(-grad_CK.sum(-1, keepdim=True))
    inside = (top_ids_CK >= 0) & (top_ids_CK < grad.shape[1])
    return grad.scatter_add_(1, top_ids_CK.clamp(0, grad.shape[1] - 1), grad_CK * inside)


def top_logprobs(
    hidden_CH: Tensor, head: Head, top_ids_CK: Tensor, temperature: float, workspace: LogitsWorkspace
) -> Tensor:
    """Compute differentiable logprobs of K different tokens of each row.

    Args:
        hidden_CH: final hidden states of the loss rows, in the compute dtype.
        head: its leaf receives a gradient.
        top_ids_CK: int64 token ids, distinct within each row.
        temperature: logits are divided by this.
        workspace: limits the logits held at the same time.

    Returns:
        float32 [C, K].
    """
    out = _TopLogprobs.apply(hidden_CH, head.weight, head, top_ids_CK, temperature, workspace)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
