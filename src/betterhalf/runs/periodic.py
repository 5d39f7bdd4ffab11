"""Evaluations during training: before the first step, every few steps, and after the last.

Their draws have keys of their own, and they read the engine's weights only, so training is the same with and without
them. Every evaluation uses the same prompts and the same random numbers, which takes most of the sampling noise out of
differences between steps, and `betterhalf evaluate` gives the same numbers for the last checkpoint.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from betterhalf.diagnostics.estimates import Estimate
from betterhalf.metrics.evaluation import metric_name
from betterhalf.run_dir import RunDir, append_jsonl, read_jsonl
from betterhalf.runs.assembly import Parts
from betterhalf.runs.evaluation import PromptResult, estimates, evaluate_set
from betterhalf.setup.trained_policy import best_evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodicResult:
    """Result of the evaluation after one step."""

    metrics: dict[str, float]
    """`evaluation/NAME/...` of each data set, and the time it took."""
    accuracy: float
    """avg@k that decides which checkpoint is the best."""
    improved: bool
    """True if it is better than that of every earlier step with a checkpoint."""
    text: str
    """The result in one line."""


def evaluated(run: RunDir, step: int) -> bool:
    """Return whether the run holds the evaluation after `step`."""
    return any(row["step"] == step for row in read_jsonl(run.evaluated_steps))


def evaluate_after(parts: Parts, run: RunDir, step: int, policy_version: int) -> PeriodicResult:
    """Evaluate the engine's weights on every data set, and add a row to `evaluated_steps.jsonl`.

    Args:
        parts: engine, data sets and settings.
        run: folder of the run.
        step: last finished step; 0 before the first.
        policy_version: version of the engine's weights.
    """
    started, config = time.perf_counter(), parts.config
    found = {
        data.name: evaluate_set(parts, data, range(data.prompts), policy_version=policy_version)
        for data in parts.evaluation
    }
    measured = {name: estimates(results, config.evaluate, config.seed) for name, results in found.items()}
    average = f"avg@{config.evaluate.samples}"
    chosen = [measured[config.evaluate.best_of]] if config.evaluate.best_of else list(measured.values())
    accuracy = statistics.fmean(one[average].value for one in chosen)
    before = best_evaluation(run)
    metrics = {name: value for data in found for name, value in _metrics(data, found[data], measured[data]).items()}
    append_jsonl(run.evaluated_steps, {"step": step, "accuracy": accuracy, **metrics})
    where = f"step {step}" if step else "before training"
    shown = "; ".join(f"{name} {average} {one[average]}" for name, one in measured.items())
    return PeriodicResult(
        metrics=metrics | {"time/evaluate_seconds": time.perf_counter() - started},
        accuracy=accuracy,
        improved=step > 0 and (before is None or accuracy > before.accuracy),
        text=f"{where}: evaluation: {shown}",
    )


def _metrics(data: str, results: Sequence[PromptResult], found: dict[str, Estimate]) -> dict[str, float]:
    """Return the metrics of one data set."""
    completions = sum(result.samples for result in results)
    metrics = {
        f"evaluation/{data}/length/mean": sum(result.tokens for result in results) / completions,
        f"evaluation/{data}/truncated_fraction": sum(result.truncated for result in results) / completions,
    }
    for name, estimate in found.items():
        for statistic, value in (("mean", estimate.value), ("low", estimate.low), ("high", estimate.high)):
            metrics[metric_name(data, name, statistic)] = value
    return metrics
