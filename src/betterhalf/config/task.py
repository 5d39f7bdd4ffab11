"""The section `[task]`: one class for each type of task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.types import ArithmeticStyle, BadRowAction, PromptTemplate


class ArithmeticTask(Section):
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
    bad_rows: BadRowAction = "refuse"
    """Rows that cannot be used (too long, not encodable, an answer that no completion can match): refuse to start and
    name them, or skip and count them."""
    allow_changed_data: bool = False
    """Allow a run to resume with other rows, or with another version of the reward's code, than it started with."""


class MathTask(Section):
    """Problems with a checkable answer, from a JSONL file, graded by math-verify in worker processes."""

    type: Literal["math"] = "math"
    path: str
    """JSONL file with the fields `problem` and `answer`, or a data-set name on the Hugging Face hub."""
    split: str = "train"
    """Split, when `path` is a hub name."""
    template: PromptTemplate = "chat"
    """Prompt around a problem: the tokenizer's chat template, one of the paper's two templates, or none."""
    reward_seconds: float = Field(10.0, gt=0)
    """Time limit for grading one completion; one that exceeds it gets the reward 0 and is counted."""
    reward_workers: int = Field(2, ge=1)
    """Number of worker processes for grading."""
    bad_rows: BadRowAction = "refuse"
    """Rows that cannot be used (too long, not encodable, an answer that no completion can match): refuse to start and
    name them, or skip and count them."""
    allow_changed_data: bool = False
    """Allow a run to resume with other rows, or with another version of the reward's code, than it started with."""


class PerfectibleTask(Section):
    """A perfectible set, made earlier: only prompts that the base policy solves in some of its attempts."""

    type: Literal["perfectible"] = "perfectible"
    path: str
    """A `perfectible.jsonl` that `betterhalf sanity` wrote."""
    base: Annotated[ArithmeticTask | MathTask, Field(discriminator="type")] = ArithmeticTask()
    """Task whose prompts were filtered; it also computes the reward."""


TaskConfig = Annotated[ArithmeticTask | MathTask | PerfectibleTask, Field(discriminator="type")]
"""The task; its key `type` chooses the class."""
