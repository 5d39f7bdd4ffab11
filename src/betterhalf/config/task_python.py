"""The section `[task]` with `type = "python"`: rewards and tasks of one's own."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from betterhalf.config.data import DataConfig
from betterhalf.config.section import Section
from betterhalf.types import RewardErrorAction, RewardNormalisation

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Pattern of the names of rewards: each is a part of a dotted key and of a metric."""


class RewardTerm(Section):
    """One of several rewards; a bare string is its function."""

    shorthand: ClassVar[str | None] = "function"

    function: str
    """Import path: `module:function` or `file.py:function`. It takes (prompts, completions, metadata)."""
    weight: float = 1.0
    """Factor of this reward in the sum; 0 only measures it."""
    batched: bool = True
    """True if the function takes the lists of all siblings of a prompt; false if it takes one completion at a time."""


class PythonTask(DataConfig):
    """Prompts from a file or from a class of one's own, and rewards from functions of one's own in worker processes."""

    type: Literal["python"] = "python"
    path: str = ""
    """JSONL or Parquet file, or the name of a data set on the Hugging Face hub; all fields of a row reach the reward as
    metadata. Empty if `task` gives the prompts."""
    answer_field: str | None = None
    """Field with the gold answer, for `rollouts.jsonl`; absent if the data has none."""
    task: str | None = None
    """Import path of a class, `module:Class` or `file.py:Class`, that gives the prompts in place of `path`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that the class gets."""
    reward: str | None = None
    """Import path of the only reward: `module:function` or `file.py:function`."""
    batched: bool = True
    """True if `reward` takes the lists of all siblings of a prompt; false if it takes one completion at a time."""
    rewards: dict[str, RewardTerm] = Field(default_factory=dict)
    """Several rewards by name, each a table `[task.rewards.NAME]` or the import path alone; their weighted sum is the
    reward."""
    normalise: RewardNormalisation = "none"
    """`group`: standardise each reward, and each named component of a sum, over the siblings of a prompt before the
    weights. `none`: add them up as they are."""
    scale: float = 1.0
    """Factor of the sum."""
    clip: tuple[float, float] | None = None
    """Lowest and highest reward, after `scale`; `none` for no bounds."""
    time_limit: float = Field(10.0, gt=0)
    """Seconds that one reward may take for all siblings of one prompt; then its worker is killed and replaced."""
    workers: int = Field(2, ge=1)
    """Number of worker processes."""
    memory_gib: float | None = Field(8.0, gt=0)
    """Address space that a worker may use beyond its imports, in GiB; `none` for no limit, which CUDA needs."""
    on_error: RewardErrorAction = "score"
    """Action on a completion whose reward failed: `score` gives it `error_reward` and counts it; `stop` ends the run
    with exit status 3."""
    error_reward: float = 0.0
    """Value of a reward that failed, before normalisation and weight."""

    @property
    def terms(self) -> dict[str, RewardTerm]:
        """Every reward by name; the only one has the name of its function."""
        if self.reward is None:
            return self.rewards
        name = self.reward.rpartition(":")[2].replace(".", "_")
        return {name: RewardTerm(function=self.reward, batched=self.batched)}

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if bool(self.path) == (self.task is not None):
            raise ValueError(
                "the python task sets both path and task, also if one comes from a file that it extends. Remove one."
                if self.path
                else "the python task has neither path nor task. Set task.path to a data file, or task.task to "
                "module:Class."
            )
        if self.settings and self.task is None:
            raise ValueError("task.settings are for the class of task.task. Set task.task, or remove them.")
        if self.filter is not None and self.task is not None:
            raise ValueError("task.filter is for the rows of task.path, and task.task is set. Remove one of them.")
        return self

    @model_validator(mode="after")
    def _has_rewards(self) -> Self:
        if self.reward is not None and self.rewards:
            raise ValueError("task.reward and task.rewards are both set. Move the first to [task.rewards.NAME].")
        if not self.terms and self.task is None:
            raise ValueError("the python task has no reward. Set task.reward to module:function or file.py:function.")
        for name in self.rewards:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"the reward {name!r} names a metric. Use letters, digits, - and _ only.")
        return self

    @model_validator(mode="after")
    def _numbers_make_sense(self) -> Self:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"task.clip={list(self.clip)} is empty. Give the lowest reward, then the highest.")
        if self.terms and not any(term.weight for term in self.terms.values()):
            raise ValueError("every reward has weight 0, so nothing is learned. Give one a weight.")
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"task.scale={self.scale} leaves no reward. Give another number.")
        return self
