"""Metrics of the tokens that truncated sampling could draw; the catalogue includes them."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

SUPPORT = (
    Metric(
        "rollout/support/tokens/mean",
        "tokens",
        "Only with `sampling.top_p`, `top_k` or `min_p`: mean number of tokens that could be drawn at a position.",
    ),
    Metric("rollout/support/tokens/max", "tokens", "Largest number of tokens that could be drawn at a position."),
    Metric(
        "rollout/support/mass/mean",
        "share",
        "Mean share of the engine's probability that these tokens had before truncation.",
    ),
)
"""Metrics of a run with `sampling.top_p`, `sampling.top_k` or `sampling.min_p`."""
