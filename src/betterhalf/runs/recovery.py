"""Go on when the engine's process dies: a new one takes its place, gets the current weights, and is asked again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineDiedError
from betterhalf.rollout.build import capabilities

_T = TypeVar("_T")


class Restarts:
    """Counts the restarts of one step, and tells the user of each."""

    def __init__(self, limit: int, tell: Callable[[str], None] | None = None) -> None:
        """Allow `limit` restarts; notes go to `tell`, by default to standard error."""
        self.limit = limit
        self.count = 0
        self._tell = tell or _to_standard_error

    def note(self, error: EngineDiedError) -> None:
        """One more.

        Raises:
            EngineDiedError: it is one too many.
        """
        if self.count >= self.limit:
            raise EngineDiedError(
                f"the engine died {self.count + 1} times in one step (engine.max_restarts={self.limit}); {error}"
            ) from error
        self.count += 1
        self._tell(f"note: {error}\nStarting the engine again ({self.count} of {self.limit}); no step is lost.")


def restarts_of(config: RunConfig) -> Restarts:
    """Return a counter that allows the restarts that the configured engine declares."""
    return Restarts(capabilities(config).max_restarts)


def retry_on_engine_death(action: Callable[[], _T], revive: Callable[[], object], restarts: Restarts) -> _T:
    """The result of `action`; when the engine dies in it, `revive` and do it again.

    `revive` may find the new engine dead as well: that counts like another death.

    Raises:
        EngineDiedError: it died once more than `restarts` allows.
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
