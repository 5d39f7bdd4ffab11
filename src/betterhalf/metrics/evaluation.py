"""Metrics of the evaluations during training, whose names contain that of a data set.

`evaluation/DATA/accuracy/mean` is avg@k, `evaluation/DATA/pass_at_K/mean` pass@k, `evaluation/DATA/majority_at_K/mean`
maj@k, each with `low` and `high`, the bounds of its interval over prompts.
"""

from __future__ import annotations

import re

from betterhalf.metrics.metric import Metric

_WORDS = {"avg": "accuracy", "pass": "pass_at_{k}", "maj": "majority_at_{k}"}
"""Name of a metric by the name of its estimate, without the k."""

_KNOWN = re.compile(
    r"evaluation/[A-Za-z0-9][A-Za-z0-9_-]*/"
    r"(?:(?:accuracy|pass_at_[0-9]+|majority_at_[0-9]+)/(?:mean|low|high)|length/mean|truncated_fraction)"
)

TEMPLATES = (
    Metric(
        "evaluation/DATA/accuracy/mean",
        "reward",
        "avg@k: mean reward of all completions of the data set DATA; `low` and `high` in place of `mean`, here and "
        "below, bound its interval over prompts.",
    ),
    Metric("evaluation/DATA/pass_at_K/mean", "share", "pass@K: chance that one of K completions solves a prompt."),
    Metric(
        "evaluation/DATA/majority_at_K/mean",
        "share",
        "maj@K: chance that the majority vote of K completions is right; for tasks that extract answers.",
    ),
    Metric("evaluation/DATA/length/mean", "tokens", "Mean length of the completions."),
    Metric("evaluation/DATA/truncated_fraction", "share", "Completions that ended at the length limit."),
)
"""The metrics for documentation; DATA stands for the name of a data set, and K for a number of completions."""

MEANING = (
    "Accuracy of the policy after a step, on data of its own ([evaluate.md](evaluate.md)); only in the steps that\n"
    "`evaluate.every` chooses. `evaluated_steps.jsonl` also holds those before the first step, as step 0."
)
"""Meaning of the area."""


def metric_name(data: str, estimate: str, statistic: str) -> str:
    """Return the name of a metric.

    Args:
        data: name of the data set.
        estimate: `avg@k`, `pass@k` or `maj@k`, with a number for k.
        statistic: `mean`, `low` or `high`.
    """
    kind, _, k = estimate.partition("@")
    return f"evaluation/{data}/{_WORDS[kind].format(k=k)}/{statistic}"


def is_evaluation(name: str) -> bool:
    """Return whether `name` is a metric of an evaluation during training."""
    return _KNOWN.fullmatch(name) is not None
