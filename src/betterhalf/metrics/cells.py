"""Progress of a sweep on the terminal: finished cells, running cells, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from betterhalf.metrics.console import OutputMode, TerminalView, duration, number, reading
from betterhalf.metrics.events import emit


class CellsView(TerminalView):
    """View of the cells of a sweep: a bar and the running cells on a terminal, a line for each result elsewhere."""

    def __init__(self, mode: OutputMode, *, steps: Mapping[str, int], total: int, stream: TextIO | None = None) -> None:
        """Prepare the view.

        Args:
            mode: form of the output.
            steps: number of steps of each cell that is left to run, by label.
            total: number of cells of the sweep, finished ones included.
            stream: standard error by default.
        """
        super().__init__(mode, stream)
        self._steps, self._total = dict(steps), total
        self._done = total - len(steps)
        self._running: dict[str, tuple[int, float | None]] = {}
        self._work_left = sum(steps.values())
        self._work_done = 0
        self._started = time.monotonic()

    def show(self, label: str, event: Mapping[str, Any]) -> None:
        """Show an event of a running cell: its steps, its warnings, and what its process writes."""
        if self._mode == "events":
            emit(self._stream, {"run": label, **event})
        elif "step" in event:
            self._step(label, int(event["step"]), reading(event.get("metrics") or {}, "rollout/reward/mean"))
        elif "warning" in event or "output" in event:
            self._print(f"{label}: {event.get('warning') or event['output']}")
        self._refresh()

    def _step(self, label: str, step: int, reward: float | None) -> None:
        before, _ = self._running.get(label, (step - 1, None))  # a continued cell begins after its checkpoint
        if label not in self._running:
            self._work_left -= before
        self._running[label] = (step, reward)
        self._work_done += step - before

    def finish(self, label: str, text: str) -> None:
        """Show the result of a cell in words."""
        step, _ = self._running.pop(label, (0, None))
        self._work_left -= self._steps[label] - step  # steps that an early end leaves out
        self._done += 1
        left = f", about {duration(self._seconds_left())} left" if self._done < self._total else ""
        if self._mode == "events":
            emit(self._stream, {"run": label, "note": text})
        elif self._mode != "quiet":
            self._print(f"[{self._done}/{self._total}{left}] {label}: {text}")
        self._refresh()

    def _seconds_left(self) -> float:
        if not self._work_done:
            return math.nan
        remaining = max(0, self._work_left - self._work_done)
        return (time.monotonic() - self._started) / self._work_done * remaining

    def _view_now(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"{self._done} of {self._total} runs",
            ProgressBar(total=max(1, self._work_left), completed=self._work_done, width=30),
            Text(f"{duration(self._seconds_left())} left", style="dim"),
        )
        running = Table.grid(padding=(0, 2))
        for label, (step, reward) in self._running.items():
            running.add_row(label, f"step {step}/{self._steps[label]}", f"reward {number(reward, '.3f')}")
        return Group(head, running)
