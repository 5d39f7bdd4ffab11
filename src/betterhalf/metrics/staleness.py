"""Catalogue of the staleness: what updates since the sampling add to the mismatch."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

STALENESS = (
    Metric(
        "staleness/versions",
        "updates",
        "Applied updates between the weights that sampled the step and those that it updates: the optimizer steps of "
        "the step before that were not skipped; 0 where the step was not sampled ahead.",
    ),
    Metric("staleness/k1/mean", "nats", "KL(p to q), estimated by the mean of -log_ratio: unbiased, signed, noisy."),
    Metric(
        "staleness/k3/mean",
        "nats",
        "The same KL by the mean of exp(log_ratio) - 1 - log_ratio: unbiased, never negative. It has no band: in the "
        "runs measured so far (docs/mismatch.md) it follows the learning rate, and no value of it separates sound runs "
        "from broken ones.",
    ),
    Metric("staleness/log_ratio/mean", "nats", "Mean of log_ratio over tokens."),
    Metric("staleness/log_ratio/std", "nats", "Standard deviation of log_ratio over tokens."),
    Metric("staleness/log_ratio/max_abs", "nats", "Largest abs(log_ratio)."),
    Metric("staleness/sequence_log_ratio/std", "nats", "Standard deviation over completions of the summed log_ratio."),
    Metric(
        "staleness/ess_fraction",
        "share",
        "Effective sample size of the completions weighted by q/p: what the updates alone leave of the batch.",
        (0.5, None),
        "by definition: below it, half of the batch is lost",
    ),
)
"""Part of the catalogue."""
