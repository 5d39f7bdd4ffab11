"""One entry of the catalogue of metrics."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

from betterhalf.types import Reduction

Band = tuple[float | None, float | None]

MetricValue = float | str | None
"""A number; a name, such as that of a parameter; or None for what a step could not measure."""


FREE_AREAS = ("task", "loss")
"""Areas of metrics that the user's own rewards and losses return; their names are in no catalogue."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Description of one metric of `metrics.jsonl`."""

    name: str
    """`area/quantity/statistic`."""
    unit: str
    """Unit; a `share` is between 0 and 1."""
    meaning: str
    """One or two sentences of documentation."""
    band: Band | None = None
    """(lowest, highest) healthy value, either of them None for no limit; None for no band."""
    source: str = ""
    """Source of the band."""
    reduction: Reduction = "mean"
    """Reduction of the values of the optimizer steps in one step to the value of the step."""

    def healthy(self, value: float) -> bool:
        """Return True if the value is within the band, bounds included; NaN never is."""
        lower, upper = self.band or (None, None)
        return not isnan(value) and (lower is None or value >= lower) and (upper is None or value <= upper)
