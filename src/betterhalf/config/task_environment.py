"""The section `[task]` with `type = "environment"`: episodes of several turns."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from betterhalf.config.data import DataConfig


class EnvironmentTask(DataConfig):
    """Episodes of several turns: a class of one's own answers each turn of the model, and rewards the whole episode."""

    type: Literal["environment"] = "environment"
    environment: str
    """Import path of the class: `module:Class` or `file.py:Class`. docs/environments.md lists its methods."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments with which the class is created."""
    path: str = ""
    """JSONL file or Parquet file with the first prompts, or the name of a data set on the Hugging Face hub; every field
    reaches the environment as metadata. Without it, the method `prompts` of the class gives them."""
    answer_field: str | None = None
    """Field with the gold answer; absent if the data has none."""
    max_turns: int = Field(8, ge=1)
    """Maximum number of turns of the model; an episode that the environment would continue is cut there and counted."""
    max_observation_tokens: int = Field(1024, ge=1)
    """Maximum length of an observation, in tokens; a longer one loses its end."""
    time_limit: float = Field(10.0, gt=0)
    """Seconds that one answer or reward of the environment may take; then its worker is killed and replaced."""
    workers: int = Field(2, ge=1)
    """Number of worker processes in which the environment runs."""
    memory_gib: float | None = Field(8.0, gt=0)
    """Address space that a worker may use beyond its imports, in GiB; `none` for no limit, which CUDA needs."""
    failure_reward: float = 0.0
    """Reward of an episode in which the environment raised an error or ran out of time."""

    @model_validator(mode="after")
    def _has_a_second_turn(self) -> Self:
        if self.template not in _TEMPLATES:
            raise ValueError(
                f"task.template={self.template} is a single question and has no second turn. Set task.template=chat, "
                "or task.template=none to insert observations as they are."
            )
        return self


_TEMPLATES = frozenset({"chat", "none"})
"""Prompt templates that can go on after an observation."""
