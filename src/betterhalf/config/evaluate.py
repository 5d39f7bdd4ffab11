"""The section `[evaluate]`: sampling of `betterhalf evaluate`, and of the evaluations during training."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.config.task import TaskConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Pattern of names of data sets: each is a part of a dotted key and of the name of a metric."""


class EvaluateConfig(Section):
    """Sampling of `betterhalf evaluate`, and of the evaluations during training."""

    samples: int = Field(8, ge=1)
    """Number of completions of each prompt: the k of avg@k, and the largest k of pass@k and maj@k."""
    max_prompts: int | None = Field(None, ge=1)
    """Maximum number of prompts of each data set to evaluate; all if absent."""
    data: dict[str, TaskConfig] = Field(default_factory=dict)
    """Data sets to evaluate, `[evaluate.data.NAME]`, each with the keys of a task; the run's own task if there are
    none."""
    k: tuple[int, ...] | None = Field(None, min_length=1)
    """The k of pass@k and maj@k; powers of two up to `samples` if absent."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample from the most likely tokens that together reach this probability; as in `[sampling]` if absent, like the
    next three."""
    top_k: int | None = Field(None, ge=-1)
    """Number of most likely tokens to sample from; -1 or 0 for all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Smallest probability of a token to sample, as a share of the largest one."""
    max_tokens: int | None = Field(None, ge=1)
    """Maximum length of a completion, in tokens."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Confidence level of the intervals."""
    resamples: int = Field(1000, ge=100)
    """Number of bootstrap resamples of the prompts."""
    deployment_gap: bool = False
    """Estimate the accuracy of the trainer's policy as well, by importance weights on the engine's completions; for the
    verb `evaluate` only."""
    every: int = Field(0, ge=0)
    """Number of training steps between evaluations, which also happen before the first and after the last step; 0 for
    none."""
    keep_best: bool = True
    """Keep the checkpoint with the best evaluation besides the newest ones."""
    best_of: str | None = None
    """Data set whose accuracy decides which checkpoint is the best; the mean of all if absent."""

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        for k in self.k or ():
            if not 1 <= k <= self.samples:
                raise ValueError(
                    f"evaluate.k={','.join(map(str, self.k or ()))} holds {k}, but pass@k and maj@k need k from 1 to "
                    f"evaluate.samples={self.samples}. Raise evaluate.samples, or leave out {k}."
                )
        for name in self.data:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"the data set {name!r} is part of metric names. Use letters, digits, - and _ only.")
        if self.best_of is not None and self.best_of not in self.data:
            known = ", ".join(self.data) or "none"
            raise ValueError(
                f"evaluate.best_of={self.best_of} is not a data set of [evaluate.data] ({known}). Name one of them, or "
                "leave it out."
            )
        return self

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k and maj@k, ascending."""
        powers = (2**power for power in range(self.samples.bit_length()))
        return tuple(sorted(set(powers if self.k is None else self.k)))
