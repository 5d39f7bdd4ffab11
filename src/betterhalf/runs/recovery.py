"""Recovery from a crash of the engine's process: restart it, load the current weights, and repeat the request."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineDiedError
from betterhalf.rollout.build import capabilities

_T = TypeVar("_T")


class Restarts:
    """Counter of the restarts in one step; notes each one for the user."""

    def __init__(self, limit: int, tell: Callable[[str], None] | None = None) -> None:
        """Start at 0.

        Args:
            limit: maximum number of restarts in one step.
            tell: receives the notes; standard error by default.
        """
        self.limit = limit
        self.count = 0
        self._tell = tell or _to_standard_error

    def note(self, error: EngineDiedError) -> None:
        """Count a restart after `error`.

        Raises:
            EngineDiedError: the limit is exceeded.
        """
        if self.count >= self.limit:
            raise EngineDiedError(
                f"the engine died {self.count + 1} times in one step (engine.max_restarts={self.limit}); {error}"
            ) from error
        self.count += 1
        self._tell(f"note: {error}\nRestarting the engine ({self.count} of {self.limit}); no step is lost.")


def restarts_of(config: RunConfig) -> Restarts:
    """Return a counter that allows the restarts that the configured engine declares."""
    return Restarts(capabilities(config).max_restarts)


def retry_on_engine_death(action: Callable[[], _T], revive: Callable[[], object], restarts: Restarts) -> _T:
    """Return the result of `action`; after each crash of the engine, call `revive` and repeat `action`.

    A crash during `revive` counts as another one.

    Args:
        action: uses the engine.
        revive: restarts the engine and loads the weights.
        restarts: limit on restarts, and their count.

    Raises:
        EngineDiedError: the engine crashed once more often than `restarts` allows.
    """
    dead = False
    while True:
        try:
            if dead:
                revive()
                dead = False
            return action()
        except EngineDiedError as error:
            restarts.note(error)
            dead = True


def _to_standard_error(message: str) -> None:
    print(message, file=sys.stderr)
