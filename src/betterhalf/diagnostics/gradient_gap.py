"""Distance between two gradients, and the spread of the sequence importance weights of a batch.

Sums are in float64, over pieces of one tensor at a time: no gradient is ever held in float64 as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.diagnostics.logprob_gap import ess_fraction

_PIECE = 2**20
"""Entries compared at once: their float64 copies take 8 MiB each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientGap:
    """Distance of a gradient from a reference; NaN where either is not finite or the reference is zero everywhere."""

    relative_error: float
    """||g - reference|| / ||reference||, over all parameters together."""
    cosine: float
    """Cosine of the angle between the two."""
    zeroed_fraction: float
    """Share of the reference's non-zero entries that are exactly zero in the gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpread:
    """Spread of the sequence importance weights w = exp(sum over tokens of log pi - log mu) of one batch."""

    ess_fraction: float
    """(sum w)^2 / (S sum w^2): 1 when all are equal, 1/S when one outweighs the rest."""
    max_weight: float
    """Largest weight."""


@torch.no_grad()
def gradient_gap(
    gradients: Iterable[tuple[str, Tensor]], reference: Mapping[str, Tensor], *, scale: float = 1.0
) -> GradientGap:
    """Compare two gradients of the same parameters.

    Args:
        gradients: (name, accumulated gradient, still multiplied by the loss scale). Zeros are counted before the
            division by it, so that only zeros of the half-precision backward pass count.
        reference: name -> gradient without a loss scale; the same names.
        scale: loss scale by which `gradients` are divided, in float64.

    Raises:
        ValueError: the names differ.
    """
    rows, names = [], []
    for name, gradient in gradients:
        if name not in reference:
            raise ValueError(f"the reference has no gradient of {name}; compare gradients of the same model.")
        names.append(name)
        rows.extend(_sums(gradient, reference[name], scale))
    if len(names) != len(reference):
        raise ValueError(
            f"there are {len(names)} gradients, and {len(reference)} in the reference; use the same model for both."
        )
    return _gap(torch.stack(rows).sum(0).tolist())


def weight_spread(sequence_log_ratio_S: Tensor) -> WeightSpread:
    """Return the spread of the weights exp(log-ratio), [S >= 1]; log-ratios are bounded to +-20 as in the loss."""
    bounded_S = sequence_log_ratio_S.double().clamp(-ops.LOG_RATIO_BOUND, ops.LOG_RATIO_BOUND)
    return WeightSpread(ess_fraction=ess_fraction(bounded_S), max_weight=math.exp(float(bounded_S.max())))


def _sums(gradient: Tensor, reference: Tensor, scale: float) -> list[Tensor]:
    """Return float64 [6] of each piece: |g - r|^2, |g|^2, |r|^2, g.r, non-zero entries of r, those zero in g."""
    pieces = zip(torch.split(gradient.reshape(-1), _PIECE), torch.split(reference.reshape(-1), _PIECE), strict=True)
    return [_piece_sums(own, wanted, scale) for own, wanted in pieces]


def _piece_sums(own: Tensor, wanted: Tensor, scale: float) -> Tensor:
    nonzero = wanted != 0
    zeroed = (nonzero & (own == 0)).sum()
    g, r = own.double() / scale, wanted.double()
    difference = g - r
    return torch.stack([difference @ difference, g @ g, r @ r, g @ r, nonzero.sum().double(), zeroed.double()])


def _gap(sums: list[float]) -> GradientGap:
    difference, own, wanted, product, nonzero, zeroed = sums
    if not (math.isfinite(own) and 0 < wanted < math.inf):
        return GradientGap(relative_error=math.nan, cosine=math.nan, zeroed_fraction=math.nan)
    # A gradient of zeros has no direction; sqrt(x * x) is exactly x, so that equal gradients have cosine 1.
    cosine = product / math.sqrt(own * wanted) if own > 0 else 0.0
    return GradientGap(
        relative_error=math.sqrt(difference / wanted),
        cosine=max(-1.0, min(1.0, cosine)),
        zeroed_fraction=zeroed / nonzero,
    )
