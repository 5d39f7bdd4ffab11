"""The section `[task]`: one class for each type of task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.types import ArithmeticStyle, BadRowAction, PromptTemplate


class ArithmeticTask(Section):
    """Arithmetic made up on the fly."""

    type: Literal["arithmetic"] = "arithmetic"
    style: ArithmeticStyle = "running_sum"
    """`running_sum`: eight digits summed step by step, the demo model's task. `word_problem`: plain sentences for a
    chat model. `auto`: word problems if the tokenizer has a chat template, else running sums."""
    num_prompts: int = Field(4096, ge=1)
    """Size of the data set; the i-th prompt depends on `seed` and i alone."""
    seed: int = 0
    """Seed of the problems (not of the run)."""
    terms: int = Field(8, ge=2, le=16)
    """Digits in a running sum."""
    bad_rows: BadRowAction = "refuse"
    """Rows that cannot be used (too long, not encodable, an answer that cannot be met): stop before the run and name
    them, or leave them out and count them."""
    allow_changed_data: bool = False
    """Resume a run even if its rows, or the code of its reward, are not those it was started with."""


class MathTask(Section):
    """Problems with a checkable answer, from a JSONL file, graded by math-verify in worker processes."""

    type: Literal["math"] = "math"
    path: str
    """JSONL file with the fields `problem` and `answer`, or a data-set name on the Hugging Face hub."""
    split: str = "train"
    """Split, when `path` is a hub name."""
    template: PromptTemplate = "chat"
    """How the problem is put to the model: the tokenizer's chat template, or one of the paper's two templates."""
    reward_seconds: float = Field(10.0, gt=0)
    """Time limit for grading one completion; a time-out scores 0 and is counted."""
    reward_workers: int = Field(2, ge=1)
    """Worker processes that grade."""
    bad_rows: BadRowAction = "refuse"
    """Rows that cannot be used (too long, not encodable, an answer that cannot be met): stop before the run and name
    them, or leave them out and count them."""
    allow_changed_data: bool = False
    """Resume a run even if its rows, or the code of its reward, are not those it was started with."""


class PerfectibleTask(Section):
    """A perfectible set made earlier: only prompts that the base policy solves sometimes."""

    type: Literal["perfectible"] = "perfectible"
    path: str
    """`perfectible.jsonl` written by `betterhalf sanity`."""
    base: Annotated[ArithmeticTask | MathTask, Field(discriminator="type")] = ArithmeticTask()
    """The task whose prompts were filtered; it also gives the reward."""


TaskConfig = Annotated[ArithmeticTask | MathTask | PerfectibleTask, Field(discriminator="type")]
"""The task; `type` chooses."""
