"""Logprobs and entropy of completion tokens from final hidden states, in FP32, a chunk of logits at a time.

Where sampling was truncated, each chunk is first restricted to the tokens that could be drawn (`training.support`).

A memory budget limits the logits held at the same time. In the forward pass a chunk is some rows over the whole
vocabulary, as softmax requires. The backward pass computes the logits again (or reuses them, if they were a single
chunk), and there a chunk is all rows over part of the vocabulary: the normaliser of each row is saved, so the gradient
of a logit needs no other logit, and each part of the head's gradient is one product, rounded once, without a sum over
chunks (arXiv 2411.09009 splits the vocabulary in this way on a GPU).

Operands of the head are on the half grid; logits and softmax are FP32 (MiniMax-M1, arXiv 2506.13585, traced its gap
between engines to the precision of the head). The logits' gradient is rounded to the format of the weight that it is
multiplied by: to half where the hardware multiplies half numbers (a GPU; BF16 on a CPU that has the instructions), with
FP32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.kernels import fused
from betterhalf.precision.products import add_product, direct_sum, product, product_into
from betterhalf.precision.tiled_products import tiled_product
from betterhalf.training.support import SupportMask

_CACHED_LOGITS = 2**21
"""Logits of a chunk in the backward pass on a CPU: 8 MiB, which stay in its cache while they are read three times."""
_FEWEST_COLUMNS = 256
_LOG_OF_ZERO = -104.0
"""Log-probability below which the FP32 exponential is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The LM head's weight, [V, H]: the leaf, and the operand of each kind of product; often the same tensor."""

    weight: Tensor
    """Leaf in the compute dtype; receives the gradient, rounded once."""
    logits_weight: Tensor
    """Operand of the logits: FP32 on a CPU, the leaf's values in the compute dtype on a GPU."""
    grad_weight: Tensor
    """Operand of the gradient's products: FP32, or half where the hardware multiplies half numbers."""
    tiled_weight: Tensor | None = None
    """`logits_weight` as `packed`, if the logits of a row must not depend on the other rows; else None."""
    transform: ops.LogitTransform = ops.PLAIN_LOGITS
    """Function of the model that follows the product."""

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Compute the FP32 logits of some rows, as `token_logprobs` does."""
        if self.tiled_weight is not None:
            return self.transform.apply_(tiled_product(hidden_CH.float(), self.tiled_weight))
        return self.transform.apply_(head_logits(hidden_CH, self.logits_weight))


class LogitsWorkspace:
    """Limit on the logits held at the same time, and on a CPU the memory that holds them.

    That memory is kept between passes: Linux reclaims large blocks when they are freed, and faulting them in again
    costs as much as a third of the product that fills them. Each use overwrites the last.
    """

    def __init__(self, *, logits: int) -> None:
        """Hold at most `logits` FP32 numbers; nothing is allocated before the first use."""
        self.logits = logits
        self.uses = 0
        """Number of times the memory was written."""
        self._memory = torch.empty(0)
        self._gradient = torch.empty(0)

    def multiply(
        self,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        tiled_VH: Tensor | None = None,
        transform: ops.LogitTransform = ops.PLAIN_LOGITS,
    ) -> Tensor:
        """Compute `Head.logits` of a chunk; on a CPU the result is valid until the next use."""
        self.uses += 1
        return transform.apply_(self._multiplied(hidden_CH, weight_VH, tiled_VH))

    def _multiplied(self, hidden_CH: Tensor, weight_VH: Tensor, tiled_VH: Tensor | None) -> Tensor:
        if tiled_VH is not None:
            return tiled_product(hidden_CH.float(), tiled_VH)
        if not hidden_CH.is_cpu:
            return head_logits(hidden_CH, weight_VH)
        shape = hidden_CH.shape[0], weight_VH.shape[0]
        if self._memory.numel() < shape[0] * shape[1]:
            # A later pass with gradients could not write to an inference tensor.
            with torch.inference_mode(False):
                self._memory = torch.empty(shape[0] * shape[1])
        logits_CV = self._memory[: shape[0] * shape[1]].view(shape)
        product_into(logits_CV, hidden_CH.float(), weight_VH)
        return logits_CV

    def multiply_back(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply as `_product` does; an FP32 result on a CPU is valid until the next use."""
        if not (right.is_cpu and right.dtype == torch.float32):
            return _product(left, right)
        size = left.shape[0] * right.shape[1]
        if self._gradient.numel() < size:
            self._gradient = torch.empty(size)
        out = self._gradient[:size].view(left.shape[0], right.shape[1])
        product_into(out, left, right.t())
        return out

    def rows(self, vocabulary: int) -> int:
        """Return the number of rows of a chunk that spans the vocabulary; at least one."""
        return max(1, self.logits // vocabulary)

    def columns(self, rows: int, *, on_cpu: bool) -> int:
        """Return the number of vocabulary entries of a chunk with this number of rows."""
        logits = min(self.logits, _CACHED_LOGITS) if on_cpu else self.logits
        return max(_FEWEST_COLUMNS, logits // max(rows, 1))


class _TokenScores(torch.autograd.Function):
    """[C, H] hidden, [V, H] head -> [C] logprobs, and [C] entropies if wanted.

    The backward pass reuses the logits of a single chunk unless their memory was overwritten; otherwise it computes the
    logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        logits_weight_VH: Tensor,
        grad_weight_VH: Tensor,
        tiled_weight_VH: Tensor | None,
        targets_C: Tensor,
        temperature: float,
        workspace: LogitsWorkspace,
        entropies: bool,
        support: SupportMask | None,
        transform: ops.LogitTransform,
    ) -> tuple[Tensor, ...]:
        rows, parts = workspace.rows(logits_weight_VH.shape[0]), []
        with_entropies = partial(ops.scores, truncated=support is not None)
        score: Callable[..., tuple[Tensor, ...]] = with_entropies if entropies else ops.normalised
        chunks = zip(torch.split(hidden_CH, rows), torch.split(targets_C, rows), strict=True)
        for index, (hidden, targets) in enumerate(chunks):
            logits = workspace.multiply(hidden, logits_weight_VH, tiled_weight_VH, transform)
            if support is not None:
                support.restrict(logits, row=index * rows)
            parts.append(score(logits, targets, temperature))
        logprobs_C, normaliser_C, *entropies_C = (torch.cat(columns) for columns in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_CH, logits_weight_VH, grad_weight_VH, targets_C, normaliser_C, *entropies_C)
        ctx.weight_VH = weight_VH
        ctx.temperature, ctx.workspace, ctx.support, ctx.transform = temperature, workspace, support, transform
        ctx.logits_CV, ctx.use = (logits if len(parts) == 1 else None), workspace.uses
        return logprobs_C, *entropies_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_CH, logits_weight_VH, grad_weight_VH, targets_C, *rows = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden_CH.shape, dtype=torch.float32, device=hidden_CH.device)
        total = direct_sum(ctx.weight_VH) if ctx.needs_input_grad[1] else None
        alone = ctx.needs_input_grad[1] and total is None
        grad_VH = torch.empty_like(grad_weight_VH, dtype=hidden_CH.dtype) if alone else None
        columns = ctx.workspace.columns(hidden_CH.shape[0], on_cpu=hidden_CH.is_cpu)
        kept = ctx.logits_CV if ctx.use == ctx.workspace.uses else None
        operand = hidden_CH.to(grad_weight_VH.dtype)
        if ctx.support is not None:
            # The logprob of a single supported token is constant; logits computed again would leave rounding noise.
            grad_outputs = tuple(grad.masked_fill(ctx.support.single_C, 0.0) for grad in grad_outputs)
        for start in range(0, grad_weight_VH.shape[0], columns):
            part = slice(start, start + columns)
            logits = _again(ctx, hidden_CH, logits_weight_VH[part], start) if kept is None else kept[:, part]
            grad_logits = _grad_logits(
                logits,
                targets_C - start,
                tuple(rows),
                grad_outputs,
                ctx.temperature,
                grad_weight_VH.dtype,
                ctx.transform,
            )
            grad_hidden += _product(grad_logits, grad_weight_VH[part])
            if total is not None:
                add_product(total[part], grad_logits.t(), operand.t())
            elif grad_VH is not None:
                grad_VH[part] = ctx.workspace.multiply_back(grad_logits.t(), operand)
        return grad_hidden.to(hidden_CH.dtype), grad_VH, *(None,) * 9


def _again(ctx: Any, hidden_CH: Tensor, logits_weight_VH: Tensor, start: int) -> Tensor:
    """Compute the logits of part of the vocabulary, from token `start`, again in a backward pass."""
    logits: Tensor = ctx.transform.apply_(head_logits(hidden_CH, logits_weight_VH))
    if ctx.support is not None:
        ctx.support.restrict(logits, column=start)
    return logits


def head_logits(hidden_CH: Tensor, wide_VH: Tensor) -> Tensor:
    """Compute FP32 logits: from half operands with FP32 sums on a GPU, from widened operands on a CPU."""
    if hidden_CH.dtype == wide_VH.dtype == torch.float32 or not hidden_CH.is_cuda:
        return product(hidden_CH.float(), wide_VH)
    return torch.mm(hidden_CH, wide_VH.t(), out_dtype=torch.float32)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply with FP32 sums; the result is FP32, except for half operands on a CPU, where it is rounded to half."""
    if right.is_cuda and right.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return product(left, right.t())


def _grad_logits(
    logits_CV: Tensor,
    targets_C: Tensor,
    rows: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    temperature: float,
    dtype: torch.dtype,
    transform: ops.LogitTransform,
) -> Tensor:
    """Return the gradient of targets' logprobs and of entropies with respect to the head's product, rounded once.

    It is (onehot - softmax) * grad / temperature. `targets_C` are relative to the first of these logits; a target may
    be outside them. `rows` has the normalisers, [C], and the entropies H, [C], if there is a gradient of them too: it
    adds -softmax * (log softmax + H) * grad / temperature.
    """
    if not transform.identity:
        plain = _grad_logits(logits_CV, targets_C, rows, grads, temperature, torch.float32, ops.PLAIN_LOGITS)
        return transform.backward(plain, logits_CV).to(dtype)
    normaliser_C, grad_C = rows[0], grads[0]
    if len(rows) > 1:
        return _grad_with_entropies(logits_CV, targets_C, rows, grads, temperature).to(dtype)
    if fused(logits_CV):
        # Imported only on a GPU, because it needs Triton.
        from betterhalf.kernels import vocabulary

        return vocabulary.grad_logits(logits_CV, targets_C, normaliser_C, grad_C, temperature, dtype)
    scaled = logits_CV if temperature == 1.0 else logits_CV / temperature
    grad_C = grad_C / temperature
    grad = (scaled - normaliser_C.unsqueeze(-1)).exp_().mul_(-grad_C.unsqueeze(-1))
    inside = (targets_C >= 0) & (targets_C < grad.shape[1])
    here = targets_C.clamp(0, grad.shape[1] - 1).unsqueeze(-1)
    return grad.scatter_add_(1, here, (grad_C * inside).unsqueeze(-1)).to(dtype)


def _grad_with_entropies(
    logits_CV: Tensor, targets_C: Tensor, rows: tuple[Tensor, ...], grads: tuple[Tensor, ...], temperature: float
) -> Tensor:
    """Return `_grad_logits` in FP32, with the gradient of the entropies."""
    scaled = logits_CV if temperature == 1.0 else logits_CV / temperature
    grad_C1, entropy_grad_C1 = (grad.unsqueeze(-1) / temperature for grad in grads)
    log_softmax = scaled - rows[0].unsqueeze(-1)
    probabilities = log_softmax.exp()
    # A removed token has a log-softmax of minus infinity, and a gradient of 0.
    log_softmax.clamp_(min=_LOG_OF_ZERO)
    factor = grad_C1 + (log_softmax + rows[1].unsqueeze(-1)) * entropy_grad_C1
    grad_logits = probabilities.mul_(-factor)
    inside = (targets_C >= 0) & (targets_C < grad_logits.shape[1])
    here = targets_C.clamp(0, grad_logits.shape[1] - 1).unsqueeze(-1)
    return grad_logits.scatter_add_(1, here, grad_C1 * inside.unsqueeze(-1))


def token_logprobs(
    hidden_CH: Tensor,
    head: Head,
    targets_C: Tensor,
    temperature: float,
    workspace: LogitsWorkspace,
    support: SupportMask | None = None,
) -> Tensor:
    """Compute differentiable logprobs of the targets.

    Args:
        hidden_CH: final hidden states of the loss rows, in the compute dtype.
        head: its leaf receives a gradient.
        targets_C: int64 token ids.
        temperature: logits are divided by this.
        workspace: limits the logits held at the same time.
        support: tokens over which each row is normalised; None for the whole vocabulary. The logits of other tokens
            get no gradient.

    Returns:
        float32 [C].
    """
    return _apply(hidden_CH, head, targets_C, temperature, workspace, False, support)[0]


def logprobs_and_entropies(
    hidden_CH: Tensor,
    head: Head,
    targets_C: Tensor,
    temperature: float,
    workspace: LogitsWorkspace,
    support: SupportMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `token_logprobs`, bit for bit, and the entropies of the rows; float32 [C] both, differentiable."""
    logprobs_C, entropies_C = _apply(hidden_CH, head, targets_C, temperature, workspace, True, support)
    return logprobs_C, entropies_C


def _apply(
    hidden_CH: Tensor,
    head: Head,
    targets_C: Tensor,
    temperature: float,
    workspace: LogitsWorkspace,
    entropies: bool,
    support: SupportMask | None,
) -> tuple[Tensor, ...]:
    out = _TokenScores.apply(
        hidden_CH,
        head.weight,
        head.logits_weight,
        head.grad_weight,
        head.tiled_weight,
        targets_C,
        temperature,
        workspace,
        entropies,
        support,
        head.transform,
    )  # type: ignore[no-untyped-call]
    assert isinstance(out, tuple)
    return out


@torch.no_grad()
def measure_tokens(
    hidden_CH: Tensor,
    head: Head,
    targets_C: Tensor,
    temperature: float,
    workspace: LogitsWorkspace,
    support: SupportMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the logprobs of the targets and the entropy of their distributions, both float32 [C], without gradients.

    The logprobs equal those of `token_logprobs` bit for bit: same chunks, same products.
    """
    rows, logprobs, entropies = workspace.rows(head.logits_weight.shape[0]), [], []
    chunks = zip(torch.split(hidden_CH, rows), torch.split(targets_C, rows), strict=True)
    for index, (hidden, targets) in enumerate(chunks):
        logits = workspace.multiply(hidden, head.logits_weight, head.tiled_weight, head.transform)
        if support is not None:
            support.restrict(logits, row=index * rows)
        found = ops.logprobs_and_entropy(logits, targets, temperature, truncated=support is not None)
        logprobs.append(found[0])
        entropies.append(found[1])
    return torch.cat(logprobs), torch.cat(entropies)
