"""A task out of two parts: problems, which give prompts, and a grader, which gives rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from betterhalf.tasks.draw import distinct_stream
from betterhalf.tasks.fingerprint import DataRecord, row_digest
from betterhalf.tasks.prompting import Draft, encode
from betterhalf.tasks.row import BadRow, Row
from betterhalf.tasks.task import Tokenizer
from betterhalf.types import FinishReason, Prompt


class Problems(Protocol):
    """A data set in a fixed order."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        ...

    def __len__(self) -> int:
        """Problems in it; at least 1."""
        ...

    def row(self, index: int) -> Row:
        """The problem at `index` as its source holds it."""
        ...

    def draft(self, index: int) -> Draft:
        """The problem at `index` as text for the model.

        Raises:
            RowError: it cannot be put into the template.
        """
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

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return one reason for each gold answer that no completion can meet; None for the others.

        Args: the gold answers; and whether completions will be graded, so that the grader tries itself out first.

        Raises:
            RewardError: the grader cannot work.
        """
        ...

    def close(self) -> None:
        """End worker processes; calling it twice is harmless."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetTask:
    """A `Task`: problems in seeded order, and their grader."""

    problems: Problems
    grader: Grader
    reward_source: Mapping[str, str]
    """Settings and code that make rewards and prompts from the rows; see `fingerprint.reward_source`."""
    encoded: Sequence[Sequence[int]] | None = None
    """Token ids of every prompt, once `screening.screen` has checked them."""
    left_out: tuple[BadRow, ...] = ()
    """Rows that cannot be used and were skipped."""

    def __len__(self) -> int:
        """Prompts in the data set."""
        return len(self.problems)

    def prompt(self, index: int) -> Prompt:
        """The prompt at `index` of the data set."""
        token_ids = None if self.encoded is None else self.encoded[index]
        return encode(self.problems.tokenizer, self.problems.draft(index), token_ids)

    def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
        """`count` prompts from `position` on, of an endless stream of seeded shuffles; see `Task.prompts`."""
        return [self.prompt(index) for index in distinct_stream(len(self), position, count, seed)]

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """One reward for each completion."""
        return self.grader.rewards(prompts, texts, finish_reasons)

    @property
    def timeouts(self) -> int:
        """Rewards that ran out of time so far."""
        return self.grader.timeouts

    def record(self) -> DataRecord:
        """Digests of the rows, in order, and of what the reward is computed by."""
        digests = b"".join(row_digest(self.problems.row(index)) for index in range(len(self)))
        return DataRecord(row_digests=digests, reward=dict(self.reward_source))

    def place(self, index: int) -> str:
        """Name of row `index` for people."""
        return self.problems.row(index).place

    @property
    def unparsed_answers(self) -> int:
        """Answers that could not be read so far."""
        return self.grader.unparsed_answers

    def close(self) -> None:
        """End the grader's worker processes."""
        self.grader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Some problems of another data set."""

    base: Problems
    indices: Sequence[int]
    """In the base, in order."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.base.tokenizer

    def __len__(self) -> int:
        """Problems kept."""
        return len(self.indices)

    def row(self, index: int) -> Row:
        """The problem at `index` among those kept."""
        return self.base.row(self.indices[index])

    def draft(self, index: int) -> Draft:
        """The problem at `index` among those kept, as text."""
        return self.base.draft(self.indices[index])
