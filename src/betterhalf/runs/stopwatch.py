"""Seconds spent in each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sum of wall-clock seconds by phase; on a GPU it synchronises, so that a phase includes the work it launched."""

    def __init__(self, device: torch.device) -> None:
        """Start now; only `device`, which computes the phases, is synchronised."""
        self._device = device
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        """Return the seconds since the stopwatch was created."""
        return time.perf_counter() - self.started

    def metrics(self, phases: tuple[str, ...]) -> dict[str, float]:
        """Return `time/<phase>_seconds` for each phase (0 if it did not run) and `time/step_seconds`."""
        named = {f"time/{phase}_seconds": self.seconds.get(phase, 0.0) for phase in phases}
        return {"time/step_seconds": self.total(), **named}
