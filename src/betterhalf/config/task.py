"""The section `[task]`: one class for each type of task."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from betterhalf.config.data import DataConfig, PromptConfig, RowsConfig
from betterhalf.config.section import Section
from betterhalf.config.task_environment import EnvironmentTask
from betterhalf.config.task_python import PythonTask
from betterhalf.types import AnswerExtraction, ArithmeticStyle


class ArithmeticTask(RowsConfig):
    """Arithmetic problems, generated from a seed."""

    type: Literal["arithmetic"] = "arithmetic"
    style: ArithmeticStyle = "running_sum"
    """`running_sum`: digits added step by step, the task of the demo model. `word_problem`: plain sentences, for a chat
    model. `auto`: word problems if the tokenizer has a chat template, running sums otherwise."""
    num_prompts: int = Field(4096, ge=1)
    """Size of the data set; the i-th prompt depends only on `seed` and i."""
    seed: int = 0
    """Seed of the problems, independent of the seed of the run."""
    terms: int = Field(8, ge=2, le=16)
    """Number of digits in a running sum."""


class MathTask(DataConfig):
    """Problems with a checkable answer, from a data set, graded by math-verify in worker processes."""

    type: Literal["math"] = "math"
    reward_seconds: float = Field(10.0, gt=0)
    """Time limit for grading one completion; one that exceeds it gets the reward 0 and is counted."""
    reward_workers: int = Field(2, ge=1)
    """Number of worker processes for grading."""

    @model_validator(mode="after")
    def _has_answers(self) -> Self:
        if self.answer_field is None:
            raise ValueError("task.answer_field is absent, but the math task grades by the answer. Name its field.")
        return self


class ReasoningGymTask(PromptConfig):
    """Problems of a reasoning-gym generator, scored by the generator itself in worker processes."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    generator: str
    """Name of the generator, such as `chain_sum`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the generator, such as `max_terms`; its own defaults for the others."""
    num_prompts: int = Field(1000, ge=1)
    """Number of problems, those held out not included; the i-th depends only on `seed`, i and the settings."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the problems, independent of the seed of the run."""
    extract: AnswerExtraction = "tags"
    """Part of a completion that is scored: the text inside the last `<answer>` tags, the last line that is not empty,
    the last word without punctuation, the last number, or all of it."""
    reward_seconds: float = Field(10.0, gt=0)
    """Time limit for scoring one completion; one that exceeds it gets the reward 0 and is counted."""
    reward_workers: int = Field(2, ge=1)
    """Number of worker processes for scoring."""


BaseTaskConfig = Annotated[
    ArithmeticTask | MathTask | ReasoningGymTask | PythonTask | EnvironmentTask, Field(discriminator="type")
]
"""A task with prompts of its own."""


class PerfectibleTask(Section):
    """A perfectible set, made earlier: only prompts that the base policy solves in some of its attempts."""

    type: Literal["perfectible"] = "perfectible"
    path: str
    """A `perfectible.jsonl` that `betterhalf sanity` wrote."""
    base: BaseTaskConfig = ArithmeticTask()
    """Task whose prompts were filtered; it also computes the reward."""


TaskConfig = Annotated[
    ArithmeticTask | MathTask | ReasoningGymTask | PythonTask | EnvironmentTask | PerfectibleTask,
    Field(discriminator="type"),
]
"""The task; its key `type` chooses the class."""
