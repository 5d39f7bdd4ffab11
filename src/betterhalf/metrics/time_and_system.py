"""Catalogue of the metrics that may differ between a run and its repetition: `time/` and `system/`."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

TIME = (
    Metric("time/step_seconds", "s", "Wall-clock time of the whole step."),
    Metric(
        "time/generate_seconds",
        "s",
        "Sampling completions; with `pipeline.max_staleness = 1`, the part that the step waited for.",
    ),
    Metric(
        "time/ahead_seconds",
        "s",
        "Sampling and grading this step's completions while the step before was learned, 0 if the step waited for all "
        "of it; only with `pipeline.max_staleness = 1`, and not part of the step.",
    ),
    Metric("time/reward_seconds", "s", "Grading completions."),
    Metric("time/measure_seconds", "s", "Computing trainer logprobs before any update."),
    Metric("time/train_seconds", "s", "Forward, backward and optimizer steps."),
    Metric("time/sync_seconds", "s", "Sending the weights to the engine and comparing digests."),
    Metric(
        "time/evaluate_seconds",
        "s",
        "Evaluating the policy after the step, where `evaluate.every` asks for it; not part of the step.",
    ),
)

SYSTEM = (
    Metric(
        "system/tokens_per_second", "tokens/s", "Completion tokens sampled in the step, divided by its wall-clock time."
    ),
    Metric(
        "system/kept_tokens_per_second",
        "tokens/s",
        "Completion tokens that the step trains on, divided by its wall-clock time.",
    ),
    Metric("system/peak_memory_gib", "GiB", "Peak memory: that of the device on a GPU, that of the process on a CPU."),
)
