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
    Metric(
        "experts/change_fraction/max_layer",
        "share",
        "The same share in the layer where it is largest. No band: it grows with the number of layers.",
    ),
    Metric(
        "experts/change_fraction/any_layer",
        "share",
        "Share of tokens with different experts in any layer. No band: it grows with the number of layers.",
    ),
    Metric(
        "experts/load/mean",
        "1",
        "Tokens of a layer's busiest expert, divided by an even load, mean over layers; as the trainer chooses. No "
        "band: by definition it is between 1 (even) and experts / experts per token (every token chooses the same), so "
        "each model has a range of its own, and its pretraining a level in it. A rise within a run says that routers "
        "collapse. Measured (docs/LOG.md): 1.9 to 2.1 of at most 4 in 40 steps of the demo mixture, without a trend.",
    ),
    Metric(
        "experts/load/max",
        "1",
        "The same in the layer where it is largest. No band, for the same reason; measured 1.9 to 2.3.",
    ),
    Metric(
        "experts/unused_fraction",
        "share",
        "Share of experts that no token of the step chose. No band: it depends on the tokens of a step and on the "
        "number of experts. With even loads it would be (1 - experts per token / experts) ^ tokens, which is 0 in any "
        "real step; measured 0 in 40 steps of the demo mixture. A rise within a run says that experts die.",
    ),
)
"""Metrics of a run with a mixture of experts."""
