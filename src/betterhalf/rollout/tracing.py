"""Engines that show every operation of their forward pass."""

from __future__ import annotations

from typing import Protocol

from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.native.decoder import Decoder


class TracedEngine(RolloutEngine, Protocol):
    """A rollout engine whose operations can be observed and replaced one by one (`EngineCapabilities.traces`)."""

    @property
    def decoder(self) -> Decoder:
        """Forward pass of the engine; its `tap` sees the result of every operation."""
        ...
