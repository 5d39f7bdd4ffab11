"""Statistics of the policy loss and of what it cut off, over micro-batches, ranks and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from betterhalf.algorithms.regularisation import Regularisation
from betterhalf.reduction import MAX, SUM, declared_reductions
from betterhalf.types import Reduction


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats:
    """Sums and maxima over tokens: float64 scalars on the device of the loss, so that counting does not synchronise."""

    loss: Tensor = field(metadata=SUM)
    """Sum of the losses of micro-batches; each is the share of a micro-batch in the loss of its train batch."""
    kl_loss: Tensor = field(metadata=SUM)
    """Sum of the KL penalties in these losses."""
    entropy_bonus: Tensor = field(metadata=SUM)
    """Sum of the entropy bonuses that were subtracted in these losses."""
    tokens: Tensor = field(metadata=SUM)
    """Completion tokens that had a loss."""
    long_tokens: Tensor = field(metadata=SUM)
    """Tokens in completions longer than half the length limit."""
    clipped: Tensor = field(metadata=SUM)
    """Tokens whose gradient PPO's clip removed."""
    masked: Tensor = field(metadata=SUM)
    """Tokens dropped by a mask, of the surrogate or of the correction."""
    long_masked: Tensor = field(metadata=SUM)
    """Masked tokens in completions longer than half the length limit."""
    truncated: Tensor = field(metadata=SUM)
    """Tokens with a weight capped at its upper bound."""
    bounded: Tensor = field(metadata=SUM)
    """Tokens with a log-ratio bounded to +-20."""
    ratio: Tensor = field(metadata=SUM)
    """Sum of the surrogate's ratio."""
    ratio_max: Tensor = field(metadata=MAX)
    """Largest of the surrogate's ratios."""
    ratio_max_negative: Tensor = field(metadata=MAX)
    """Largest ratio current/proximal of a single token, among the tokens with a negative advantage; 0 without one."""
    weight_before: Tensor = field(metadata=SUM)
    """Sum of the whole importance weight of each token, before any treatment."""
    weight_before_squared: Tensor = field(metadata=SUM)
    """Sum of the squares of that weight."""
    weight_after: Tensor = field(metadata=SUM)
    """Sum of the weight that multiplies the gradient: after truncation, masks and clip."""
    weight_after_squared: Tensor = field(metadata=SUM)
    """Sum of the squares of that weight."""
    gradient_squared: Tensor = field(metadata=SUM)
    """Sum over tokens of the squared norm of the scaled loss's gradient with respect to their final hidden state."""
    gradient_squared_max: Tensor = field(metadata=MAX)
    """Largest of these squared norms."""
    treated: Tensor = field(metadata=SUM)
    """Tokens whose treatment is known: all, but none with a loss of the user's own."""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """Metrics under `loss/`, of a loss of the user's own or of a part of the built-in one that is off by default: name
    -> float64 [2], sum over tokens and number of tokens."""

    @classmethod
    def empty(cls) -> LossStats:
        """Return the statistics of zero tokens: the neutral element of `+`."""
        zeros: dict[str, Any] = {name: torch.zeros((), dtype=torch.float64) for name in declared_reductions(cls)}
        return cls(**zeros)

    @classmethod
    def count(
        cls,
        *,
        loss: Tensor,
        ratio_C: Tensor,
        negative_ratio_C: Tensor,
        before_C: Tensor,
        after_C: Tensor,
        clipped_C: Tensor,
        kept_C: Tensor,
        truncated_C: Tensor,
        bounded_C: Tensor,
        long_C: Tensor,
    ) -> LossStats:
        """Return the statistics of the C tokens of one micro-batch, before its backward pass.

        `loss` is a scalar, ratios and weights are floating point, the others bool. `negative_ratio_C` has the
        current/proximal ratio of the tokens with a negative advantage, and 0 for the others.
        """
        before_C, after_C, ratio_C = before_C.detach().double(), after_C.detach().double(), ratio_C.detach().double()
        return cls(
            loss=loss.detach().double(),
            kl_loss=before_C.new_zeros(()),
            entropy_bonus=before_C.new_zeros(()),
            tokens=torch.ones_like(before_C).sum(),
            long_tokens=_sum(long_C),
            clipped=_sum(clipped_C),
            masked=_sum(~kept_C),
            long_masked=_sum(~kept_C & long_C),
            truncated=_sum(truncated_C),
            bounded=_sum(bounded_C),
            ratio=ratio_C.sum(),
            ratio_max=_largest(ratio_C),
            ratio_max_negative=_largest(negative_ratio_C.detach().double()),
            weight_before=before_C.sum(),
            weight_before_squared=before_C.square().sum(),
            weight_after=after_C.sum(),
            weight_after_squared=after_C.square().sum(),
            gradient_squared=before_C.new_zeros(()),
            gradient_squared_max=before_C.new_zeros(()),
            treated=torch.ones_like(before_C).sum(),
        )

    def of_own_loss(self, metrics: Mapping[str, Tensor]) -> LossStats:
        """Return the statistics of a loss of the user's own, whose treatment of tokens is unknown, with its metrics."""
        return replace(self, treated=torch.zeros_like(self.tokens), own=metrics)

    def with_terms(self, loss: Tensor, terms: Regularisation) -> LossStats:
        """Return the statistics of a loss to which a KL penalty was added, and an entropy bonus subtracted."""
        return replace(
            self,
            loss=loss.detach().double(),
            kl_loss=terms.kl_loss.detach().double(),
            entropy_bonus=terms.entropy_bonus.detach().double(),
            # A token may be bounded in several ratios.
            bounded=torch.minimum(self.bounded + _sum(terms.bounded_C), self.tokens),
        )

    def with_gradient(self, grad_CH: Tensor) -> LossStats:
        """Return the statistics of a micro-batch with the gradients of its tokens, after its backward pass.

        Args:
            grad_CH: gradient with respect to the final hidden state of each token, in any scale that the micro-batches
                of an optimizer step share.
        """
        squared_C = torch.linalg.vector_norm(grad_CH, dim=-1, dtype=torch.float32).double().square()
        return replace(self, gradient_squared=squared_C.sum(), gradient_squared_max=_largest(squared_C))

    def __add__(self, other: LossStats) -> LossStats:
        """Return the statistics of both together; each field is reduced as it declares."""
        return LossStats(
            **{
                name: _COMBINE[kind](getattr(self, name), getattr(other, name))
                for name, kind in declared_reductions(LossStats).items()
            },
            own=_added(self.own, other.own),
        )


def _added(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add values of equal name; a name that one side lacks counts as 0 there."""
    return {**left, **right} | {name: left[name] + right[name] for name in left.keys() & right.keys()}


_COMBINE: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum}


_OF_TREATMENT = (
    *("policy/clip_fraction", "policy/mask_fraction", "policy/truncate_fraction"),
    *("policy/rejected_share/short", "policy/rejected_share/long", "policy/ess_before", "policy/ess_after"),
)
"""Metrics of what a built-in loss does to its ratios; a loss of the user's own has none of them."""


def policy_metrics(stats: LossStats, train_batches: int = 1) -> dict[str, float | None]:
    """Return the `policy/` and `loss/` metrics of a step; waits for the device.

    Args:
        stats: summed over the micro-batches of a step.
        train_batches: number of optimizer steps they come from; losses are means over these.

    Returns:
        A value for each name. Without tokens, every share is 0, and ratios and effective sample sizes are 1. With a
        loss of the user's own, what it clips or masks is unknown, hence None.
    """
    names = list(declared_reductions(LossStats))
    value = dict(zip(names, torch.stack([getattr(stats, name) for name in names]).tolist(), strict=True))
    tokens, long, short = value["tokens"], value["long_tokens"], value["tokens"] - value["long_tokens"]
    known: dict[str, float | None] = {
        "policy/loss": value["loss"] / max(train_batches, 1),
        "policy/kl_loss": value["kl_loss"] / max(train_batches, 1),
        "policy/entropy_bonus": value["entropy_bonus"] / max(train_batches, 1),
        "policy/clip_fraction": _share(value["clipped"], tokens),
        "policy/mask_fraction": _share(value["masked"], tokens),
        "policy/truncate_fraction": _share(value["truncated"], tokens),
        "policy/bounded_fraction": _share(value["bounded"], tokens),
        "policy/rejected_share/short": _share(value["masked"] - value["long_masked"], short),
        "policy/rejected_share/long": _share(value["long_masked"], long),
        "policy/ess_before": _ess(value["weight_before"], value["weight_before_squared"], tokens),
        "policy/ess_after": _ess(value["weight_after"], value["weight_after_squared"], tokens),
        "policy/ratio/mean": value["ratio"] / tokens if tokens else 1.0,
        "policy/ratio/max": value["ratio_max"] if tokens else 1.0,
        "policy/ratio/max_negative": value["ratio_max_negative"] or 1.0,
    }
    unknown = dict.fromkeys(_OF_TREATMENT) if tokens and not value["treated"] else {}
    return known | unknown | _own_metrics(stats)


def _own_metrics(stats: LossStats) -> dict[str, float]:
    """Return the means over tokens of the metrics under `loss/`."""
    return {f"loss/{name}": total / tokens for name, (total, tokens) in _lists(stats.own).items()}


def _lists(pairs: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return dict(zip(pairs, torch.stack(list(pairs.values())).tolist(), strict=True)) if pairs else {}


def largest_token_share(stats: LossStats) -> float:
    """Return the share of the largest token in the gradient of one optimizer step; waits for the device.

    It is the largest norm of the gradient with respect to a final hidden state, divided by the root of the sum of the
    squares of all of them: 1 if a single token has all the gradient, 1 / sqrt(tokens) if all have the same, 0 without
    any.
    """
    largest, total = torch.stack((stats.gradient_squared_max, stats.gradient_squared)).tolist()
    return math.sqrt(_share(largest, total))


def _largest(values_C: Tensor) -> Tensor:
    """Return the largest of values that are not negative; 0 if there are none."""
    return torch.cat((values_C, values_C.new_zeros(1))).amax()


def _sum(mask_C: Tensor) -> Tensor:
    return mask_C.double().sum()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _ess(total: float, squares: float, count: float) -> float:
    """Return Kish's effective sample size as a share of the sample; 0 when every weight is 0."""
    if count == 0:
        return 1.0
    return total**2 / (count * squares) if squares else 0.0
