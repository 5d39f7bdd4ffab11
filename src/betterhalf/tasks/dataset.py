"""A task made of two parts: problems, which give the prompts, and a grader, which gives the rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from betterhalf.tasks.draw import distinct_stream
from betterhalf.tasks.fingerprint import DataRecord, row_digest
from betterhalf.tasks.prompting import Draft, encode
from betterhalf.tasks.row import BadRow, Row
from betterhalf.tasks.task import Measured, Tokenizer
from betterhalf.tasks.turns import Turns
from betterhalf.types import FinishReason, Prompt


class Problems(Protocol):
    """Problems of a data set, in a fixed order."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        ...

    def __len__(self) -> int:
        """Return the number of problems; at least 1."""
        ...

    def row(self, index: int) -> Row:
        """Return the problem at `index` as stored in its source."""
        ...

    def draft(self, index: int) -> Draft:
        """Return the problem at `index` as text for the model.

        Raises:
            RowError: the template cannot render the problem.
        """
        ...


class Grader(Protocol):
    """Grader of completions; see `Task.rewards`."""

    @property
    def timeouts(self) -> int:
        """Number of rewards that timed out so far."""
        ...

    @property
    def unparsed_answers(self) -> int:
        """Number of answers that could not be parsed so far; they count as wrong."""
        ...

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return one reward for each completion."""
        ...

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return, for each gold answer, the reason why no completion can match it, or None.

        Args:
            answers: gold answers.
            will_grade: True if completions will be graded later; the grader then tests itself first.

        Raises:
            RewardError: the grader does not work.
        """
        ...

    def close(self) -> None:
        """Stop the worker processes; calling it twice is harmless."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetTask:
    """A `Task` made of problems, in seeded order, and their grader."""

    problems: Problems
    grader: Grader
    reward_source: Mapping[str, str]
    """Settings and code that determine prompts and rewards; see `fingerprint.reward_source`."""
    encoded: Sequence[Sequence[int]] | None = None
    """Token ids of every prompt; None until `screening.screen` has checked them."""
    left_out: tuple[BadRow, ...] = ()
    """Unusable rows that were skipped."""
    turns: Turns | None = None
    """Environment of episodes of several turns; None for completions of a single turn."""

    def __len__(self) -> int:
        """Return the number of prompts in the data set."""
        return len(self.problems)

    def prompt(self, index: int) -> Prompt:
        """Return the prompt at `index` of the data set."""
        token_ids = None if self.encoded is None else self.encoded[index]
        prompt = encode(self.problems.tokenizer, self.problems.draft(index), token_ids)
        return replace(prompt, metadata=self.problems.row(index).metadata)

    def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
        """Return `count` prompts, from `position` on, of an endless stream of seeded shuffles; see `Task.prompts`."""
        return [self.prompt(index) for index in distinct_stream(len(self), position, count, seed)]

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return one reward for each completion."""
        return self.grader.rewards(prompts, texts, finish_reasons)

    @property
    def timeouts(self) -> int:
        """Number of rewards that timed out so far."""
        return self.grader.timeouts

    def record(self) -> DataRecord:
        """Return digests of the rows, in order, and of the code behind the rewards."""
        digests = b"".join(row_digest(self.problems.row(index)) for index in range(len(self)))
        return DataRecord(row_digests=digests, reward=dict(self.reward_source))

    def place(self, index: int) -> str:
        """Return the location of row `index` for messages."""
        return self.problems.row(index).place

    @property
    def unparsed_answers(self) -> int:
        """Number of answers that could not be parsed so far."""
        return self.grader.unparsed_answers

    def take_metrics(self) -> dict[str, float]:
        """Return the grader's own metrics since the last call; empty for a grader without any."""
        return self.grader.take_metrics() if isinstance(self.grader, Measured) else {}

    def take_notes(self) -> list[str]:
        """Return the grader's warnings since the last call."""
        return self.grader.take_notes() if isinstance(self.grader, Measured) else []

    def close(self) -> None:
        """Stop the grader's worker processes."""
        self.grader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Subset of the problems of another data set."""

    base: Problems
    indices: Sequence[int]
    """Indices into the base, in order."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        return self.base.tokenizer

    def __len__(self) -> int:
        """Return the number of problems kept."""
        return len(self.indices)

    def row(self, index: int) -> Row:
        """Return the problem at `index` among those kept."""
        return self.base.row(self.indices[index])

    def draft(self, index: int) -> Draft:
        """Return the problem at `index` among those kept, as text."""
        return self.base.draft(self.indices[index])
