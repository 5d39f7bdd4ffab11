"""Metrics of a mixture of experts; the catalogue includes them."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

_R3 = (
    "our choice: half of what arXiv 2510.11370 reports for a BF16 engine (about 10% of the routers choose other "
    "experts), and four times the largest share of docs/mismatch.md (1.3%, a tiny untrained model in BF16)"
)

EXPERTS = (
    Metric(
        "experts/change_fraction/mean",
        "share",
        "Only for a mixture of experts, with an engine that reports its choices: share of tokens, prompts included, "
        "for which trainer and engine choose different sets of experts, mean over layers. With "
        "`algorithm.routing_replay` it is the choice that the trainer would have made.",
        (None, 0.05),
        _R3,
    ),
    Metric("experts/change_fraction/max_layer", "share", "The same share in the layer where it is largest."),
    Metric("experts/change_fraction/any_layer", "share", "Share of tokens with different experts in any layer."),
    Metric(
        "experts/load/mean",
        "1",
        "Tokens of a layer's busiest expert, divided by an even load, mean over layers; as the trainer chooses.",
    ),
    Metric("experts/load/max", "1", "The same in the layer where it is largest."),
    Metric("experts/unused_fraction", "share", "Share of experts that no token of the step chose."),
)
"""Metrics of a run with a mixture of experts."""
