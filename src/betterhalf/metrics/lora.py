"""Catalogue of what merging LoRA adapters costs."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

LORA = (
    Metric(
        "mismatch/lost_update_fraction",
        "share",
        "Weights that LoRA adapters change and that rounding leaves at the base's value in the engine. Only with "
        "`lora.merge=weights`; without a value as long as all adapters are 0.",
        (None, 0.5),
        "by definition: above it, rounding keeps most of the changed weights from the engine; every run starts near 1, "
        "since adapters start at 0",
    ),
)
"""Part of the catalogue."""
