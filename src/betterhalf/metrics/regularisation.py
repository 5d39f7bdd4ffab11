"""Catalogue of the metrics of the KL penalty and the entropy bonus."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

REGULARISATION = (
    Metric(
        "policy/reference_kl/mean",
        "nats",
        "KL(pi to the reference policy) before any update, by the mean of exp(x) - 1 - x with x = log reference - log "
        "pi, over the completion tokens of the step's own rollouts. Exactly 0 while the policy is its own reference. "
        "Only with `algorithm.kl.coefficient` above 0.",
    ),
    Metric(
        "policy/reference_kl/max",
        "nats",
        "Largest of these values of a token.",
        reduction="max",
    ),
    Metric(
        "policy/kl_loss",
        "1",
        "KL penalty in `policy/loss`, coefficient included; 0 without one, and where it lowers the reward instead.",
    ),
    Metric(
        "policy/entropy_bonus",
        "1",
        "Entropy bonus that is subtracted in `policy/loss`, coefficient included; 0 without one.",
    ),
    Metric(
        "rollout/kl_penalty/mean",
        "reward",
        "Mean over the step's own rollouts of the KL penalty subtracted from their rewards. Only with "
        "`algorithm.kl.place` reward.",
    ),
)
