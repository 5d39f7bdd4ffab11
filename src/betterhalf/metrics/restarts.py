"""Catalogue of the metrics that count processes which ended and were started again."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

ENGINE_RESTARTS = Metric(
    "rollout/engine_restarts",
    "restarts",
    "Crashes of the engine's process in the step; each time, a new process sampled the same completions.",
    (None, 0.0),
    "by definition: a healthy engine does not crash",
)

RANK_RESTARTS = Metric(
    "optim/rank_restarts",
    "restarts",
    "Deaths of a rank in the step; each time, all ranks started again from the last checkpoint.",
    (None, 0.0),
    "by definition: a healthy rank does not end",
)
