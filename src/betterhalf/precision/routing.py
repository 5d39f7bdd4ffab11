"""Routing of a mixture of experts in FP32: the choice of experts, their weights, and the sum of their results.

Trainer and native engine share these functions. transformers multiplies the router in the model's dtype;
docs/mismatch.md says what that costs.

T tokens, E experts, K experts for each token, L layers with experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_SMALL = 256
"""Number of experts whose indices fit in a byte."""


def chosen_experts(logits_TE: Tensor, count: int) -> Tensor:
    """Return the experts with the largest logits, int64 [T, K], the largest first; of equal ones the first."""
    return logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def expert_weights(logits_TE: Tensor, experts_TK: Tensor, *, normalise: bool) -> Tensor:
    """Return the weights of given experts, float32 [T, K]: their share of the softmax over all experts.

    The gradient reaches every logit, even if the experts were chosen elsewhere (arXiv 2510.11370).

    Args:
        logits_TE: float32 router logits.
        experts_TK: int64 indices of experts.
        normalise: divide the weights of a token by their sum.
    """
    weights_TK = logits_TE.softmax(-1).gather(1, experts_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True) if normalise else weights_TK


def combined(results_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the weighted sum of the experts' results, float32 [T, H], added in the order of K.

    Args:
        results_TKH: result of each expert, any format.
        weights_TK: float32.
    """
    total: Tensor = results_TKH[:, 0].float() * weights_TK[:, :1]
    for place in range(1, weights_TK.shape[1]):
        total += results_TKH[:, place].float() * weights_TK[:, place : place + 1]
    return total


def by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, tuple[int, ...]]:
    """Group the T * K pairs of token and expert by expert.

    Returns:
        int64 [T * K]: the pairs in the order of experts, those of one expert in the order of tokens; and the number of
        pairs of each expert.
    """
    flat = experts_TK.flatten()
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    return flat.argsort(stable=True), tuple(counts)


def compact(experts: Tensor, num_experts: int) -> Tensor:
    """Return indices of experts in the smallest integer format: a byte for up to 256 experts, else two."""
    return experts.to(torch.uint8 if num_experts <= _SMALL else torch.int16)


class _CombineFunction(torch.autograd.Function):
    """results [T, K, H], weights [T, K] -> [T, H]: an FP32 sum, rounded once; so is each gradient."""

    @staticmethod
    def forward(ctx: Any, results_TKH: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(results_TKH, weights_TK)
        return combined(results_TKH, weights_TK).to(results_TKH.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        results_TKH, weights_TK = ctx.saved_tensors
        grad_T1H = grad_outputs[0].float().unsqueeze(1)
        of_results = (grad_T1H * weights_TK.unsqueeze(-1)).to(results_TKH.dtype)
        of_weights = (grad_T1H * results_TKH.float()).sum(-1)
        return of_results, of_weights


def combine(results_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    """Return `combined` rounded once to the format of the results, differentiable."""
    out = _CombineFunction.apply(results_TKH, weights_TK)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _SpreadFunction(torch.autograd.Function):
    """x [T, H] -> [T * K, H], the row of the token of each pair; the gradient of a row is an FP32 sum, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.count = count
        return x[order.div(count, rounding_mode="floor")]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (order,), grad = ctx.saved_tensors, grad_outputs[0]
        pairs = torch.empty_like(grad)
        pairs[order] = grad
        return pairs.view(-1, ctx.count, grad.shape[1]).float().sum(1).to(grad.dtype), None, None


def spread(x: Tensor, order: Tensor, count: int) -> Tensor:
    """Return the row of `x` of each pair of token and expert, in the order of `by_expert`, differentiable.

    Args:
        x: [T, H].
        order: int64 [T * K], from `by_expert`.
        count: K.
    """
    out = _SpreadFunction.apply(x, order, count)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class RoutingTape:
    """Experts of one forward pass: those to use instead of the routers' choices, and those that the routers chose."""

    def __init__(self) -> None:
        """Neither replay nor record."""
        self._given: Tensor | None = None
        self._found: dict[int, Tensor] | None = None

    def experts(self, layer: int, own_TK: Tensor) -> Tensor:
        """Return the experts with which a layer computes, int64 [T, K], and record its own choice.

        Args:
            layer: index among the layers with experts.
            own_TK: int64, the choice of the layer's router.
        """
        if self._found is not None:
            self._found[layer] = own_TK
        return own_TK if self._given is None else self._given[:, layer].long()

    @contextmanager
    def replaying(self, experts_TLK: Tensor | None) -> Iterator[None]:
        """Return a context in which every layer computes with these experts, int [T, L, K]; None for its own.

        A backward pass that repeats the forward pass must run inside it too.
        """
        before, self._given = self._given, experts_TLK
        try:
            yield
        finally:
            self._given = before

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Return a context that fills a dictionary: index of a layer -> its router's own choice, int64 [T, K]."""
        found: dict[int, Tensor] = {}
        self._found = found
        try:
            yield found
        finally:
            self._found = None
