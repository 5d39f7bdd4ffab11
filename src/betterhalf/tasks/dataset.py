"""A task out of two parts: problems, which give prompts, and a grader, which gives rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from betterhalf.tasks.draw import distinct_stream
from betterhalf.types import FinishReason, Prompt


class Problems(Protocol):
    """A data set in a fixed order."""

    def __len__(self) -> int:
        """Problems in it; at least 1."""
        ...

    def prompt(self, index: int) -> Prompt:
        """The problem at `index`, ready for the model."""
        ...


class Grader(Protocol):
    """Gives rewards; see `Task.rewards`."""

    @property
    def timeouts(self) -> int:
        """Rewards that ran out of time so far."""
        ...

    @property
    def unparsed_answers(self) -> int:
        """Answers that could not be read so far; they count as wrong."""
        ...

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """One reward for each completion."""
        ...

    def close(self) -> None:
        """End worker processes; calling it twice is harmless."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetTask:
    """A `Task`: problems in seeded order, and their grader."""

    problems: Problems
    grader: Grader

    def __len__(self) -> int:
        """Prompts in the data set."""
        return len(self.problems)

    def prompt(self, index: int) -> Prompt:
        """The prompt at `index` of the data set."""
        return self.problems.prompt(index)

    def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
        """`count` prompts from `position` on, of an endless stream of seeded shuffles; see `Task.prompts`."""
        return [self.problems.prompt(index) for index in distinct_stream(len(self), position, count, seed)]

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """One reward for each completion."""
        return self.grader.rewards(prompts, texts, finish_reasons)

    @property
    def timeouts(self) -> int:
        """Rewards that ran out of time so far."""
        return self.grader.timeouts

    @property
    def unparsed_answers(self) -> int:
        """Answers that could not be read so far."""
        return self.grader.unparsed_answers

    def close(self) -> None:
        """End the grader's worker processes."""
        self.grader.close()
