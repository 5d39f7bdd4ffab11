"""Interface of a task with several turns: an environment that answers the model, and rewards whole episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from betterhalf.types import EpisodeEnd, FinishReason, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """An episode so far, as the environment sees it."""

    prompt: Prompt
    turns: tuple[str, ...]
    """Texts of the model's turns, at least one; from them the environment can compute its own answers again."""
    finish_reason: FinishReason
    """Reason why sampling of the last turn ended."""
    end: EpisodeEnd | None = None
    """Reason why the episode ended; None while it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A call of the environment without a result."""

    message: str
    """Reason, as a clause."""


class Turns(Protocol):
    """Multi-turn part of a task: `turns_of` finds it."""

    @property
    def max_turns(self) -> int:
        """Maximum number of turns of the model in an episode."""
        ...

    @property
    def failures(self) -> int:
        """Number of answers and rewards so far that failed."""
        ...

    def respond(self, conversations: Sequence[Conversation]) -> list[str | Failure | None]:
        """Return the next observation of each episode; None where the episode is over.

        Raises:
            RewardError: the environment cannot run at all, or failed in every one of many episodes.
        """
        ...

    def encode(self, observation: str, stop_token: int) -> tuple[int, ...]:
        """Return the tokens that the model reads after a turn that ended with `stop_token`."""
        ...

    def rewards_of(self, conversations: Sequence[Conversation]) -> list[float]:
        """Return one reward for each episode, all of which have ended.

        Raises:
            RewardError: the environment cannot run at all, or failed in every one of many episodes.
        """
        ...

    def take_notes(self) -> list[str]:
        """Return warnings for the user since the last call."""
        ...


def turns_of(task: Any) -> Turns | None:
    """Return the attribute `turns` of a task; None for a task whose completions have a single turn."""
    found: Turns | None = getattr(task, "turns", None)
    return found
