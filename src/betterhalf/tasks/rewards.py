"""What every reward must be, and the grader for rewards that are quick string work."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.errors import RewardError
from betterhalf.types import FinishReason, Prompt


def check_rewards(rewards: Iterable[Any], expected_count: int) -> list[float]:
    """Rewards as plain floats; refuse those that would silently spoil the advantages.

    A number is anything that Python converts to a float without reading text: an int, a bool (right is 1), a NumPy
    scalar, a tensor of one element.

    Raises:
        RewardError: not one reward for each completion, or one that is no finite number.
    """
    try:
        given = list(rewards)
    except TypeError as error:
        raise RewardError(
            f"the task returned {_shown(rewards)} as the rewards of {expected_count} completions; `rewards` must "
            "return a list with exactly one for each"
        ) from error
    if len(given) != expected_count:
        raise RewardError(
            f"the task returned {len(given)} rewards for {expected_count} completions; "
            "`rewards` must return exactly one for each"
        )
    return [_number(reward, f"reward {index} of {expected_count}") for index, reward in enumerate(given)]


def _number(reward: Any, name: str) -> float:
    """The reward as a finite float."""
    try:
        value = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise RewardError(f"{name} is {_shown(reward)}; make the task's grader return finite numbers")
    return value


def _shown(value: Any) -> str:
    """The value and its type; of a float the value alone."""
    return f"{value}" if isinstance(value, float) else f"{reprlib.repr(value)} ({type(value).__name__})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGrader:
    """Grades in this process by comparing text with the answer; truncated completions score 0."""

    solves: Callable[[str, str], bool]
    """(completion text, answer) -> whether it is right."""
    timeouts: int = 0
    """String work does not run out of time."""
    unparsed_answers: int = 0
    """String work reads every answer."""

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """1 for a finished completion that is right, else 0."""
        return [
            float(reason == "stop" and self.solves(text, prompt.answer))
            for prompt, text, reason in zip(prompts, texts, finish_reasons, strict=True)
        ]

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Generated answers can all be met, and no worker has to start."""
        return [None] * len(answers)

    def close(self) -> None:
        """Nothing to release."""
