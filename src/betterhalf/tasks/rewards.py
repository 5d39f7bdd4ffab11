"""What every reward must be, and the grader for rewards that are quick string work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from betterhalf.errors import RewardError
from betterhalf.types import FinishReason, Prompt


def check_rewards(rewards: Sequence[float], expected_count: int) -> None:
    """Refuse rewards that would silently spoil the advantages.

    Raises:
        RewardError: not one reward for each completion, or one that is NaN or infinite.
    """
    if len(rewards) != expected_count:
        raise RewardError(
            f"the task returned {len(rewards)} rewards for {expected_count} completions; "
            "`rewards` must return exactly one for each"
        )
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise RewardError(
                f"reward {index} of {expected_count} is {reward}; make the task's grader return finite numbers"
            )


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

    def check_golds(self, answers: Sequence[str]) -> list[str | None]:
        """Generated answers can all be met."""
        return [None] * len(answers)

    def close(self) -> None:
        """Nothing to release."""
