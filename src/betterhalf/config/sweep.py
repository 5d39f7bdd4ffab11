"""The section `[sweep]`: the axes and seeds of `betterhalf sweep`, and the way its results are summarised."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import DtypeName

Overrides = dict[str, Any]
"""Settings by key, dotted or nested."""


class SweepConfig(Section):
    """A grid of runs: every combination of the axes' values, with every seed."""

    axes: dict[str, Any] = Field({})
    """Axes by name, in the order of the table. Either a dotted key in quotes with a list of its values, such as
    `"engine.rounding" = ["engine", "aligned"]`, or a name with a table of labels, each with the settings that it
    changes together: `algorithm.dual = {"algorithm.preset" = "grpo", "algorithm.surrogate.dual_clip" = 3}`."""
    seeds: tuple[int, ...] = ()
    """Seeds of every combination; without any, the `seed` of the configuration is the only one."""
    only: tuple[dict[str, Any], ...] = ()
    """Combinations to keep: those that fit one of these tables of axis = value, or axis = [value, value]. Empty for
    all."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations to leave out, in the same form."""
    runs_at_once: int = Field(0, ge=0)
    """Number of runs at the same time, each in a process with an equal share of the threads. 0 chooses: one on a GPU or
    with vLLM; on a CPU, as many as cores and memory allow."""
    window: int = Field(20, ge=1)
    """Number of steps that the final and the best reward are means of; a quarter of the run if that is less."""
    evaluate: DtypeName | None = None
    """Precision of an engine in which each trained policy is evaluated after its last step, on fresh prompts where the
    task can make them; absent for no evaluation."""
    evaluation_prompts: int = Field(256, ge=1)
    """Number of prompts of that evaluation."""
    evaluation_samples: int = Field(1, ge=1)
    """Number of completions of each prompt in that evaluation."""
    curves: tuple[str, ...] = (
        "rollout/reward/mean",
        "mismatch/k3/mean",
        "optim/grad_norm",
        "policy/ratio/max_negative",
        "mismatch/accident_fraction",
        "optim/token_share/max",
    )
    """Metrics whose values at every step are kept in `curves.jsonl`, with four significant digits; those that a run
    does not log are left out."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs."""

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        for name, values in self.axes.items():
            if problem := _axis_problem(values):
                raise ValueError(f"the axis {name!r} of [sweep.axes] {problem}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sweep.seeds={','.join(map(str, self.seeds))} names a seed twice. Name each once.")
        return self


def _axis_problem(values: object) -> str | None:
    """Return the reason why an axis cannot be expanded, with a fix; None for a list or a table of labels."""
    if isinstance(values, (list, tuple)):
        return None if values else "has no values. List at least one, or remove the axis."
    if not isinstance(values, dict):
        return 'is not a list. Write it as a list, such as precision = ["fp16", "bf16"].'
    if not values:
        return "has no labels. Add one, or remove the axis."
    wrong = next((label for label, changes in values.items() if not isinstance(changes, dict)), None)
    if wrong is None:
        return None
    return (
        f"has the label {wrong!r}, which is not a table of settings. Write a dotted key in quotes, such as "
        f'"engine.rounding", or give the label a table, such as {wrong} = {{"training.steps" = 10}}.'
    )
