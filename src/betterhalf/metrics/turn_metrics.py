"""Metrics of episodes of several turns; a run without an environment has none of them."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

TURNS = (
    Metric("rollout/turns/mean", "turns", "Mean number of turns of the episodes; only with an environment."),
    Metric(
        "rollout/turn_limit_fraction",
        "share",
        "Episodes cut at `task.max_turns` that the environment would have continued.",
    ),
    Metric(
        "rollout/observation_tokens/mean",
        "tokens",
        "Mean number of observation tokens of an episode: context without loss, not part of the length.",
    ),
    Metric(
        "rollout/environment_failures",
        "calls",
        "Answers and rewards of the environment that raised an error or ran out of time; they end the episode.",
        (None, 0.0),
        "by definition: a sound environment does not fail",
    ),
)
"""Part of the catalogue."""
