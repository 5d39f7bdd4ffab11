"""Settings of one importance ratio."""

from __future__ import annotations

from typing import ClassVar

from betterhalf.config.section import Section
from betterhalf.types import RatioGradient, RatioLevel, RatioName, RatioTreatment


class RatioConfig(Section):
    """One importance ratio in the loss. Bounds are bounds of the ratio itself (0.8 to 1.28, not 0.2 / 0.28)."""

    shorthand: ClassVar[str | None] = "level"

    level: RatioLevel
    """Per token; product over the sequence; geometric mean over the sequence; or no ratio (1)."""
    ratio: RatioName = "current/proximal"
    """Numerator and denominator."""
    treatment: RatioTreatment = "raw"
    """Leave it as it is; cap at `upper`; drop outside [lower, upper]; PPO's two-sided clip."""
    lower: float | None = None
    """Lower bound of the ratio; `"none"` for no bound."""
    upper: float | None = None
    """Upper bound of the ratio; `"none"` for no bound."""
    keep_weight: bool = True
    """With `mask`: multiply what is kept by its ratio (true), or only mask (false)."""
    gradient: RatioGradient = "ratio"
    """Differentiate the ratio itself, or hold it constant and differentiate log pi."""
    dual_clip: float | None = None
    """Bound on the loss of negative advantages, as a multiple of the advantage (arXiv 1912.09729)."""
    probability_gap: float | None = None
    """Drop a token when the update moves pi away from mu and abs(pi - mu) exceeds this (arXiv 2602.04879); beside any
    treatment but `clip`."""
