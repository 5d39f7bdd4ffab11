"""Add up the rewards of the siblings of one prompt: normalisation, weights, scale and bounds. Pure maths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from betterhalf.types import RewardNormalisation

STD_EPS = 1e-8
"""Added to the standard deviation, as in the advantage `group_standardised`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summand:
    """One reward, or one of its components, of every sibling of a prompt."""

    weight: float
    """Factor of the reward."""
    values_G: Sequence[float]
    """[G]: values in sibling order, all finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SumRule:
    """Rule that makes one reward of several."""

    normalise: RewardNormalisation
    """`group` standardises each summand over the siblings, before its weight."""
    scale: float
    """Factor of the sum."""
    clip: tuple[float, float] | None
    """Lowest and highest reward, applied last; None for no bounds."""


def add_up(summands: Sequence[Summand], rule: SumRule) -> list[float]:
    """Return the reward of each sibling: clip(scale * sum of weight * value)."""
    normalised = _NORMALISED[rule.normalise]
    columns = [[summand.weight * value for value in normalised(summand.values_G)] for summand in summands]
    totals = [rule.scale * math.fsum(row) for row in zip(*columns, strict=True)]
    if rule.clip is None:
        return totals
    low, high = rule.clip
    return [min(max(total, low), high) for total in totals]


def standardised(values_G: Sequence[float]) -> list[float]:
    """Return (value - mean) / (sample standard deviation + 1e-8); all 0 if the values are equal, or for one sibling."""
    if len(set(values_G)) < 2:
        return [0.0] * len(values_G)
    mean = math.fsum(values_G) / len(values_G)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values_G) / (len(values_G) - 1))
    return [(value - mean) / (std + STD_EPS) for value in values_G]


_NORMALISED: dict[RewardNormalisation, Callable[[Sequence[float]], list[float]]] = {
    "none": list,
    "group": standardised,
}
