"""Progress of several runs on one terminal, from the events of their processes.

If the parent of this process asked for events, it gets those of the runs, with the name of the run under `run`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.text import Text

from betterhalf.metrics.console import OutputMode, StepView, TerminalView, duration
from betterhalf.metrics.events import emit

_PANELS = 2
"""Number of runs up to which each has a panel all the time; of more, those that have finished become a line."""


class SeveralRuns(TerminalView):
    """View of several runs at once: a panel for each on a terminal, labelled lines elsewhere."""

    def __init__(
        self, mode: OutputMode, *, labels: Sequence[str], total_steps: int, stream: TextIO | None = None
    ) -> None:
        """`labels` names the runs, of `total_steps` each; `stream` is standard error by default."""
        super().__init__(mode, stream)
        self._views = {label: StepView(total_steps=total_steps, label=label) for label in labels}
        self._phases: dict[str, str] = {}
        self._phase_started: dict[str, float] = {}

    def show(self, label: str, event: Mapping[str, Any]) -> None:
        """Show one event of the run `label`, or a line of its `output` that is not an event; ignore unknown events.

        Warnings and output are shown even in the mode `quiet`.
        """
        if self._mode == "events":
            if "error" not in event:  # the caller raises it, and the command line shows it
                emit(self._stream, {"run": label, **event})
        elif "step" in event:
            self._step(label, event)
        elif "note" in event:
            if self._mode != "quiet":
                self._note(label, str(event["note"]))
        elif "warning" in event:
            self._note(label, str(event["warning"]))
        elif "output" in event:
            self._print(f"{label}: {event['output']}")
        elif "phase" in event:
            self._phase(label, event)

    def _step(self, label: str, event: Mapping[str, Any]) -> None:
        view = self._views[label]
        view.add(int(event["step"]), event.get("metrics") or {})
        if self._mode == "lines":
            self._print(view.line())
        self._refresh()

    def _note(self, label: str, text: str) -> None:
        self._print(f"{label}:\n{text}" if "\n" in text else f"{label}: {text}")

    def _phase(self, label: str, event: Mapping[str, Any]) -> None:
        name, done, total = str(event["phase"]), int(event["done"]), int(event["total"])
        if not name.startswith(f"{label}: "):
            name = f"{label}: {name}"
        started = self._phase_started.setdefault(name, time.monotonic())
        text = f"{name}: {done}/{total}"
        self._phases[name] = text
        if self._mode == "lines" and done == 0:
            self._print(text)
        elif self._mode == "lines" and done == total:
            self._print(f"{text} in {duration(time.monotonic() - started)}")
        self._refresh()

    def _view_now(self) -> RenderableType:
        views = list(self._views.values())
        if len(views) > _PANELS:
            running = [view for view in views if view.started and not view.finished]
            lines = [Text(view.line(), style="dim", no_wrap=True) for view in views if view.finished]
            return Group(*lines, *(view.panel(self._out.width) for view in running))
        panels = [view.panel(self._out.width) for view in views]
        return Group(*panels, *(Text(line, style="dim") for line in self._phases.values()))
