"""Tensor operations that trainer, engine and diagnostics share, so that a diagnostic does not measure itself.

Axis letters: V vocabulary, C completion tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from betterhalf.kernels import fused

LOG_RATIO_BOUND = 20.0
"""Bound of log-ratios, applied once, before the exponential: exp(20) = 4.9e8 keeps FP32 sums finite."""

_AT_ONCE = 2**19
"""Number of logits in one block on a CPU: their temporaries of 2 MiB stay in its cache and reuse memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """Function that a model applies to the product of its LM head: y = cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    """Factor of every logit (Granite, Cohere)."""
    cap: float | None = None
    """Bound of every logit (Gemma 2); None without one, where y = scale * x."""

    @property
    def identity(self) -> bool:
        """True if logits are used as they are."""
        return self.scale == 1.0 and self.cap is None

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform FP32 logits of any shape in place, and return them."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return bound_(logits, self.cap)

    def backward(self, grad: Tensor, transformed: Tensor) -> Tensor:
        """Return the gradient with respect to the product of the head.

        Args:
            grad: FP32 gradient with respect to the transformed logits.
            transformed: the transformed logits; a token that sampling left out has minus infinity, and no gradient.
        """
        grad = bound_gradient(grad, transformed, self.cap)
        return grad if self.scale == 1.0 else grad * self.scale


PLAIN_LOGITS = LogitTransform()
"""Logits that are the head's product itself."""


def bound_(x: Tensor, cap: float | None) -> Tensor:
    """Replace FP32 values by cap * tanh(x / cap) in place, and return them; unchanged without a cap."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)


def bound_gradient(grad: Tensor, bounded: Tensor, cap: float | None) -> Tensor:
    """Return the gradient with respect to the argument of `bound_`.

    Args:
        grad: gradient with respect to its result.
        bounded: its result; minus infinity, for a value that was left out afterwards, has no gradient.
        cap: as in `bound_`.
    """
    return grad if cap is None else grad * (1 - (bounded / cap).square()).clamp_min(0)


def shifted_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(logits - largest of the row) in FP32, [..., V] in [0, 1], and the largest logits, [..., 1]."""
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)
    return (wide - largest).exp_(), largest


def log_normaliser(exponentials: Tensor, largest: Tensor) -> Tensor:
    """Return the log-sum-exp of the logits, float32 [...], from the results of `shifted_exp`."""
    return row_sums(exponentials).log_().add_(largest.squeeze(-1))


def row_sums(x: Tensor) -> Tensor:
    """Return the sums of the last axis, [..., V] -> [...]; on a CPU each depends on its own row alone."""
    if x.is_cpu and x.numel() == x.shape[-1]:
        # torch splits a single long row into one part for each thread, and so adds in another order.
        return x.reshape(1, -1).repeat(2, 1).sum(-1)[0].view(x.shape[:-1])
    return x.sum(-1)


def normalised(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return `token_logprobs` and the log-sum-exp that it subtracts, float32 [...] each."""
    if _by_kernel(logits):
        return _scores_on_gpu(logits, token_ids, temperature)[:2]

    def some(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
        normaliser = log_normaliser(*shifted_exp(scaled))
        return chosen(scaled, token_ids) - normaliser, normaliser

    logprobs, normaliser = _by_rows(some, logits, token_ids)
    return logprobs, normaliser


def logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor, temperature: float = 1.0, *, truncated: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `token_logprobs`, bit for bit, and the entropies of the same rows in nats; float32 [...] each.

    Logits may be minus infinity if `truncated`; see `scores`.
    """
    logprobs, _, entropies = scores(logits, token_ids, temperature, truncated=truncated)
    return logprobs, entropies


def scores(
    logits: Tensor, token_ids: Tensor, temperature: float = 1.0, *, truncated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `normalised`, bit for bit, and the entropies of the rows; float32 [...] each.

    Args:
        logits, token_ids, temperature: as in `token_logprobs`.
        truncated: True if some logits may be minus infinity, which add 0 to an entropy.
    """
    if _by_kernel(logits):
        return _scores_on_gpu(logits, token_ids, temperature)

    def some(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
        exponentials, largest = shifted_exp(scaled)
        total = row_sums(exponentials)
        below = scaled.sub(largest)
        if truncated:
            below.clamp_(min=torch.finfo(below.dtype).min)
        weighted = exponentials.mul_(below).sum(-1)
        normaliser = total.log().add_(largest.squeeze(-1))
        return chosen(scaled, token_ids) - normaliser, normaliser, total.log() - weighted / total

    logprobs, normaliser, entropies = _by_rows(some, logits, token_ids)
    return logprobs, normaliser, entropies


def _by_kernel(logits: Tensor) -> bool:
    """Return True if the Triton kernel can be used; it has no backward pass."""
    return fused(logits) and not (torch.is_grad_enabled() and logits.requires_grad)


def _scores_on_gpu(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob, normaliser and entropy, [...] each."""
    # Imported here, because it needs Triton, which is available only with a GPU.
    from betterhalf.kernels import vocabulary

    rows, shape = logits.reshape(-1, logits.shape[-1]).float().contiguous(), logits.shape[:-1]
    logprobs, normalisers, entropies = vocabulary.scores(rows, token_ids.reshape(-1), temperature)
    return logprobs.view(shape), normalisers.view(shape), entropies.view(shape)


def _by_rows(some: Callable[..., tuple[Tensor, ...]], logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Apply `some` to logits [..., V] and others [...]; on a CPU in blocks of a few rows. Results are [...] each."""
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    if not logits.is_cpu or logits.numel() <= _AT_ONCE:
        return some(logits, *others)
    flat = (logits.reshape(-1, vocabulary), *(x.reshape(-1) for x in others))
    parts = zip(*(torch.split(x, max(1, _AT_ONCE // vocabulary)) for x in flat), strict=True)
    return tuple(torch.cat(found).view(shape) for found in zip(*(some(*part) for part in parts), strict=True))


def chosen(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return each row's logit of its token: [..., V], int64 [...] -> [...]."""
    return logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each token under softmax(logits / temperature), always computed in FP32.

    Args:
        logits: [..., V], any floating dtype.
        token_ids: int64 [...].
        temperature: positive; 1 leaves the logits unchanged.

    Returns:
        float32 [...], in nats.
    """
    return normalised(logits, token_ids, temperature)[0]


def log_ratio(numerator_logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    """Return numerator minus denominator, unbounded; for the mismatch: trainer minus behavior."""
    return numerator_logprobs - denominator_logprobs


def bounded_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp of the log-ratio bounded to +-20, and a mask of the elements that were bounded."""
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return bounded.exp(), log_ratio.abs() > LOG_RATIO_BOUND


def segment_sum(values_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> Tensor:
    """Return the sum of the values of each sequence: [C] -> [S]; 0 for a sequence without values.

    Values are added in order, so that every run gives the same bits, on a GPU too, where the order of `index_add` is
    undefined. Integers are exact below 2^53.
    """
    out = _SegmentSum.apply(values_C, sequence_index_C, num_sequences)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _SegmentSum(torch.autograd.Function):
    """values [C], sequence index int64 [C], S -> [S]; the gradient of a value is that of its sequence's sum."""

    @staticmethod
    def forward(ctx: Any, values_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> Tensor:
        ctx.save_for_backward(sequence_index_C)
        order_C = sequence_index_C.argsort(stable=True)
        starts = torch.arange(num_sequences + 1, device=sequence_index_C.device)
        offsets = torch.searchsorted(sequence_index_C[order_C], starts)
        sorted_C = values_C[order_C] if values_C.is_floating_point() else values_C[order_C].double()
        sums_S: Tensor = torch.segment_reduce(sorted_C, "sum", offsets=offsets, unsafe=True)
        return sums_S.to(values_C.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (sequence_index_C,) = ctx.saved_tensors
        return grad_outputs[0][sequence_index_C], None, None


def segment_mean(values_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> Tensor:
    """Return the mean of the values of each sequence: [C] -> [S]; 0 for a sequence without values."""
    counts = segment_sum(torch.ones_like(values_C), sequence_index_C, num_sequences)
    return segment_sum(values_C, sequence_index_C, num_sequences) / counts.clamp(min=1)
