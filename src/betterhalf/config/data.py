"""Settings that tasks share: the choice of rows, the prompt around a question, and the source of a data set."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import BadRowAction, DataPart, PromptTemplate

RESERVED_ARGUMENTS = frozenset({"conversation", "messages", "tokenize", "add_generation_prompt", "chat_template"})
"""Arguments of a chat template that the task sets itself."""


class RowsConfig(Section):
    """Choice of rows; every task has it."""

    type: str
    """Kind of task."""
    held_out: float = Field(0, ge=0)
    """Rows that training never sees: a number of rows from 1 on, a share of them below 1, none at 0."""
    held_out_seed: int = 0
    """Seed that chooses the rows held out, independent of the seed of the run."""
    part: DataPart = "train"
    """Rows to use: those to train on, those held out (`betterhalf evaluate RUN task.part=held_out`), or all."""
    bad_rows: BadRowAction = "refuse"
    """Rows that cannot be used (too long, not encodable, an answer that no completion can match): refuse to start and
    name them, or skip and count them."""
    allow_changed_data: bool = False
    """Allow a run to resume with other rows, or with another version of the reward's code, than it started with."""

    @model_validator(mode="after")
    def _can_be_split(self) -> Self:
        if self.held_out >= 1 and self.held_out != int(self.held_out):
            raise ValueError(
                f"task.held_out = {self.held_out:g} is not a number of rows. Give a whole number, or a share below 1."
            )
        if self.part == "held_out" and not self.held_out:
            raise ValueError(
                "task.part = 'held_out' needs rows that are held out. Set task.held_out to a number of rows, or to a "
                "share below 1."
            )
        return self


class PromptConfig(RowsConfig):
    """Prompt around a question."""

    template: PromptTemplate = "chat"
    """Prompt around a problem: the tokenizer's chat template, one of the paper's two templates, or none."""
    instruction: str | None = None
    """Text added after each question; absent: the math task asks for a boxed answer, other tasks add nothing."""
    system_prompt: str | None = None
    """System message before each question, in place of the data's own; needs `template = "chat"`."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, such as `enable_thinking = false`; one that the template does not read is
    refused."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt in tokens; rows with longer ones are left out and counted. No limit if absent."""
    filter: str | None = None
    """`module:function` or `file.py:function` that gets the fields of a row as a mapping, and returns true to keep the
    row. The others are left out and counted."""

    @model_validator(mode="after")
    def _fits_the_template(self) -> Self:
        for key in ("system_prompt", "template_arguments"):
            if getattr(self, key) and self.template != "chat":
                raise ValueError(
                    f"task.{key} has no effect with task.template={self.template}. Remove it, or set "
                    "task.template=chat."
                )
        for name in self.template_arguments:
            if name in RESERVED_ARGUMENTS:
                raise ValueError(f"task.template_arguments.{name} is set by the task itself. Remove it.")
        return self


class DataConfig(PromptConfig):
    """Source of a data set, and the fields of its rows."""

    path: str
    """JSONL file or Parquet file, or the name of a data set on the Hugging Face hub."""
    split: str = "train"
    """Split, when `path` is a hub name."""
    subset: str | None = None
    """Subset (also called configuration), when `path` is a hub name that has several."""
    question_field: str = "problem"
    """Field with the question: text, or chat messages of `role` and `content`. Dots lead into nested fields."""
    answer_field: str | None = "answer"
    """Field with the gold answer, such as `reward_model.ground_truth`; absent if the data has none."""
    max_rows: int | None = Field(None, ge=1)
    """Number of rows to use, from the first on, before any of them are left out; all if absent."""
