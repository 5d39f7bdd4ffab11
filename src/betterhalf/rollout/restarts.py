"""Limit on the restarts of engines within one step."""

from __future__ import annotations

import sys
from collections.abc import Callable

from betterhalf.errors import EngineDiedError
from betterhalf.words import counted


class Restarts:
    """Counter of the restarts in one step; it prints a note for each."""

    def __init__(
        self, limit: int, tell: Callable[[str], None] | None = None, *, setting: str = "engine.max_restarts"
    ) -> None:
        """Start at 0.

        Args:
            limit: maximum number of restarts in one step.
            tell: receives the notes; standard error by default.
            setting: key of the limit in the configuration, for messages.
        """
        self.limit = limit
        self.count = 0
        self._setting = setting
        self._tell = tell or to_standard_error

    def note(self, error: EngineDiedError) -> None:
        """Count a restart after `error`.

        Raises:
            EngineDiedError: the limit is exceeded; `error` itself if no restart is allowed at all.
        """
        if self.limit == 0:
            raise error
        if self.count >= self.limit:
            raise EngineDiedError(
                f"the engine died {counted(self.count + 1, 'time')} in one step ({self._setting}={self.limit}); {error}"
            ) from error
        self.count += 1
        self._tell(f"note: {error}\nRestarting the engine ({self.count} of {self.limit}); no step is lost.")

    def take(self) -> int:
        """Return the number of restarts since the last call, and reset it to 0; called once in each step."""
        count, self.count = self.count, 0
        return count


def to_standard_error(message: str) -> None:
    """Print a note on standard error."""
    print(message, file=sys.stderr)
