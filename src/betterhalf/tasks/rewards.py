"""Validation of rewards, and the grader for tasks whose answers are checked by comparing strings."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.errors import RewardError
from betterhalf.types import FinishReason, Prompt


def check_rewards(rewards: Iterable[Any], expected_count: int) -> list[float]:
    """Convert rewards to plain floats; refuse those that would silently corrupt the advantages.

    A reward is anything that Python converts to a float without parsing text: an int, a bool (True is 1), a NumPy
    scalar, a tensor of one element.

    Raises:
        RewardError: there is not exactly one reward for each completion, or one is not a finite number.
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
    """Return the reward as a finite float."""
    try:
        value = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise RewardError(f"{name} is {_shown(reward)}; make the task's grader return finite numbers")
    return value


def _shown(value: Any) -> str:
    """Return a value and its type for a message; of a float the value alone."""
    return f"{value}" if isinstance(value, float) else f"{reprlib.repr(value)} ({type(value).__name__})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGrader:
    """Grader that compares text with the answer in this process; truncated completions get reward 0."""

    solves: Callable[[str, str], bool]
    """Function of (completion text, answer) that returns True for a correct completion."""
    timeouts: int = 0
    """Always 0: comparing strings has no time limit."""
    unparsed_answers: int = 0
    """Always 0: any text can be compared."""

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return 1 for a finished completion that is correct, else 0."""
        return [
            float(reason == "stop" and self.solves(text, prompt.answer))
            for prompt, text, reason in zip(prompts, texts, finish_reasons, strict=True)
        ]

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return None for every answer: generated answers can all be matched, and there are no workers to start."""
        return [None] * len(answers)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
