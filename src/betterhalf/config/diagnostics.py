"""Settings of what measures, judges and watches."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import DtypeName


class MismatchConfig(Section):
    """Measurement of the gap between trainer and engine."""

    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the step's packs that is measured; a seeded sample when below 1."""


class EvaluateConfig(Section):
    """How `evaluate` samples."""

    samples: int = Field(8, ge=1)
    """Completions of each prompt: the k of avg@k and pass@k."""
    max_prompts: int | None = Field(None, ge=1)
    """Evaluate on the first so many prompts; all if absent."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""


class SanityConfig(Section):
    """The paper's sanity test: a perfectible set, then one arm for each precision."""

    arms: tuple[DtypeName, ...] = Field(("fp16", "bf16"), min_length=1)
    """Precisions to run; the first decides the exit status."""
    candidates: int = Field(320, ge=1)
    """Prompts tried for the perfectible set."""
    samples: int = Field(40, ge=1)
    """Completions of each candidate by the base policy (the paper: 40)."""
    lower: float = Field(0.2, ge=0, le=1)
    """Keep prompts solved at least this often."""
    upper: float = Field(0.8, ge=0, le=1)
    """Keep prompts solved at most this often."""
    pass_accuracy: float = Field(0.95, ge=0, le=1)
    """Final accuracy an arm must reach."""
    evaluation_samples: int = Field(8, ge=1)
    """Completions of each prompt in the final evaluation (avg@8)."""
    arms_at_once: int = Field(0, ge=0)
    """Arms trained at the same time, each in a process of its own with an equal share of the threads. 0 chooses: one
    on a GPU or with vLLM; on a CPU as many as have a core and memory."""

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"sanity.arms={','.join(self.arms)} names an arm twice; name each precision once")
        if self.lower > self.upper:
            raise ValueError(f"sanity.lower={self.lower} exceeds sanity.upper={self.upper}; swap them")
        return self


class ProbeConfig(Section):
    """What `probe` samples and how it states its uncertainty."""

    prompts: int = Field(16, ge=1)
    """Prompts, the first ones of the task."""
    group_size: int = Field(4, ge=1)
    """Completions of each prompt."""
    bootstrap: int = Field(1000, ge=1)
    """Resamples, of prompts with all their completions, behind the standard error of each confidence interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Level of the intervals."""
    gradient_completions: int = Field(16, ge=2)
    """Completions in the batch of `--gradient`."""


class DoctorConfig(Section):
    """How much `doctor` looks at; its thresholds are in docs/doctor.md."""

    prompts: int = Field(4, ge=1)
    """Prompts for the range census and the mismatch sample."""
    group_size: int = Field(4, ge=1)
    """Completions of each prompt."""
    max_tokens: int = Field(48, ge=1)
    """Length limit of a completion in the doctor's sample."""


class WatchdogLevel(Section):
    """One rule: what is watched, and what happens when it leaves its bounds."""

    metric: str
    """A metric known before the update of a step: `mismatch/...`, `budget/...` or `rollout/...`."""
    below: float | None = None
    """The rule fires below this."""
    above: float | None = None
    """The rule fires above this."""
    steps: int = Field(1, ge=1)
    """Consecutive steps out of bounds before it fires."""
    action: Literal["warn", "mask", "halve_learning_rate", "stop"] = "warn"
    """`warn`: a note. `mask`: from this step on, drop completion tokens whose proximal/behavior ratio lies outside 0.5
    to 5 (IcePop, arXiv 2510.18855). `halve_learning_rate`: once each time it fires. `stop`: before this step's update;
    the run saves and ends with exit status 3."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.below is None and self.above is None:
            raise ValueError(f"watchdog level for {self.metric} has no bound; set below or above")
        return self


class WatchdogConfig(Section):
    """Rules checked in every step, after the mismatch is measured and before anything is updated."""

    levels: tuple[WatchdogLevel, ...] = (
        WatchdogLevel(metric="budget/predicted_ess", below=0.5, action="warn"),
        WatchdogLevel(metric="mismatch/k3/mean", above=1e-2, action="warn"),
        WatchdogLevel(metric="mismatch/k3/mean", above=0.1, action="stop"),
    )
    """In order; every rule that fires acts."""
