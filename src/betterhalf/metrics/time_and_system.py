"""Catalogue of the metrics that may differ between a run and its repetition: `time/` and `system/`."""

from __future__ import annotations

from betterhalf.metrics.metric import Metric

TIME = (
    Metric("time/step_seconds", "s", "Wall-clock time of the whole step."),
    Metric("time/generate_seconds", "s", "Sampling completions."),
    Metric("time/reward_seconds", "s", "Grading completions."),
    Metric("time/measure_seconds", "s", "Computing trainer logprobs before any update."),
    Metric("time/train_seconds", "s", "Forward, backward and optimizer steps."),
    Metric("time/sync_seconds", "s", "Sending the weights to the engine and comparing digests."),
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
