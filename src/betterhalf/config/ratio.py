"""Settings of one importance ratio: the sections `[algorithm.surrogate]` and `[algorithm.correction]`."""

from __future__ import annotations

from typing import ClassVar

from betterhalf.config.section import Section
from betterhalf.types import RatioGradient, RatioLevel, RatioName, RatioTreatment


class RatioConfig(Section):
    """One importance ratio in the loss. Bounds are those of the ratio itself: 0.8 and 1.28, not 0.2 and 0.28."""

    shorthand: ClassVar[str | None] = "level"

    level: RatioLevel
    """Ratio of each token, product over the sequence, geometric mean over the sequence, or no ratio (1)."""
    ratio: RatioName = "current/proximal"
    """Numerator and denominator."""
    treatment: RatioTreatment = "raw"
    """`raw`: leave the ratio as it is. `truncate`: cap it at `upper`. `mask`: drop what is outside [lower, upper].
    `clip`: PPO's two-sided clip."""
    lower: float | None = None
    """Lower bound of the ratio; `"none"` for no bound."""
    upper: float | None = None
    """Upper bound of the ratio; `"none"` for no bound."""
    keep_weight: bool = True
    """Multiply by the ratio what a `mask` keeps (true), or only mask (false)."""
    gradient: RatioGradient = "ratio"
    """`ratio`: differentiate the ratio. `logprob`: hold it constant and differentiate log pi."""
    dual_clip: float | None = None
    """Upper bound of the loss for negative advantages, as a multiple of the advantage (arXiv 1912.09729)."""
    probability_gap: float | None = None
    """Drop a token if the update moves pi away from mu and abs(pi - mu) exceeds this value (arXiv 2602.04879). Works
    with every treatment except `clip`."""
