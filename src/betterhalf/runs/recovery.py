"""Recovery from a crash of the engine's process: restart it, load the current weights, and repeat the request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineDiedError
from betterhalf.rollout.build import capabilities
from betterhalf.rollout.restarts import Restarts

_T = TypeVar("_T")


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
