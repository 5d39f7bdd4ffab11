"""Check of the names and shapes of the weights that arrive at an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from betterhalf.errors import EngineError


class Shaped(Protocol):
    """A tensor, or the description of one."""

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes."""
        ...


Shapes = Mapping[str, tuple[int, ...]]
"""Unfused Hugging Face name -> shape of the whole tensor."""


class WeightArrivals:
    """Check of the weights of one sync: each name once, in the engine's shape."""

    def __init__(self, shapes: Shapes, *, held: bool = False) -> None:
        """Expect the weights of `shapes`: all of them, or some of them if the engine holds the others already."""
        self._shapes = shapes
        self._held = held
        self._missing = set(shapes)

    def check(self, name: str, tensor: Shaped) -> None:
        """Check one weight and mark it as arrived.

        Raises:
            EngineError: the name is unknown or repeated, or the shape is wrong.
        """
        if name not in self._shapes:
            raise EngineError(f"the engine has no weight {name!r}; send the unfused Hugging Face names of this model")
        if name not in self._missing:
            raise EngineError(f"weight {name!r} arrived twice in one sync; send each name once")
        wanted = tuple(self._shapes[name])
        if tuple(tensor.shape) != wanted:
            raise EngineError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the engine's has {wanted}; "
                "load the engine from the trainer's configuration"
            )
        self._missing.discard(name)

    def finish(self) -> None:
        """Require that every weight has arrived, or is held from an earlier sync.

        Raises:
            EngineError: some are missing.
        """
        if self._missing and not self._held:
            raise EngineError(
                f"{len(self._missing)} weights did not arrive at the engine, {min(self._missing)!r} among them; "
                "send every weight on the first sync after a start"
            )
