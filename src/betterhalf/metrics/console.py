"""Progress of a run for people: a live panel on a terminal, one line for each step elsewhere.

It goes to standard error. Standard output is for results: tables, and the last line of `--json`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.metrics.events import emit
from betterhalf.metrics.events import wanted as events_wanted
from betterhalf.metrics.metric import MetricValue
from betterhalf.types import ConsoleMode

OutputMode = ConsoleMode | Literal["events"]
"""`auto` is `live` on a terminal and `lines` elsewhere; `events` are for a parent process (`metrics/events.py`)."""

K3 = "mismatch/k3/mean"

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_SPARK_WIDTH = 24
_TIMED_STEPS = 10
_HISTORY_STEPS = 4096
_STYLES = {"ok": "green", "high": "bold red", "low": "bold red", "": "dim"}


class TerminalView:
    """Context manager that shows a live view on a terminal, or lines elsewhere; it always restores the terminal."""

    def __init__(self, mode: OutputMode, stream: TextIO | None) -> None:
        """Show on `stream`; on standard error by default."""
        self._stream = stream or sys.stderr
        self._out = RichConsole(file=self._stream, highlight=False, soft_wrap=False)
        self._mode = resolve_mode(mode, self._out)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._mode == "live":
            self._live = Live(self._view_now(), console=self._out, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _view_now(self) -> RenderableType:
        """Return the current live view; each subclass has its own."""
        raise NotImplementedError

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._view_now(), refresh=True)

    def _print(self, text: str) -> None:
        # A line of a log is neither cut nor wrapped at the width of a terminal.
        wrap = self._live is not None
        self._out.print(Text(text), overflow="fold" if wrap else "ignore", no_wrap=not wrap, crop=wrap)


class Console(TerminalView):
    """View of the steps of one run."""

    def __init__(self, mode: OutputMode, *, total_steps: int, label: str, stream: TextIO | None = None) -> None:
        """`label` names the run, such as an arm of a sanity run; `stream` is standard error by default."""
        super().__init__(mode, stream)
        self._view = StepView(total_steps=total_steps, label=label)

    def update(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Show the metrics of `step`; a missing metric shows as a dash."""
        self._view.add(step, metrics)
        self._refresh()
        if self._mode == "lines":
            self._print(self._view.line())
        elif self._mode == "events":
            emit(self._stream, {"step": step, "metrics": dict(metrics)})

    def note(self, text: str) -> None:
        """Show one line above the panel, or between the lines; nothing in the mode `quiet`, unless it is a warning."""
        if is_warning(text):
            self.warn(text)
        elif self._mode == "events":
            emit(self._stream, {"note": text})
        elif self._mode != "quiet":
            self._print(text)

    def warn(self, text: str) -> None:
        """Show one line above the panel, or between the lines, in every mode."""
        if self._mode == "events":
            emit(self._stream, {"warning": text})
        else:
            self._print(text)

    def _view_now(self) -> RenderableType:
        return self._view.panel(self._out.width)


class StepView:
    """Metrics to show for one run, in two forms: a line and a panel."""

    def __init__(self, *, total_steps: int, label: str) -> None:
        self._total = total_steps
        self._label = label
        self._step = 0
        self._metrics: Mapping[str, MetricValue] = {}
        self._skipped = 0
        self._reward: deque[float] = deque(maxlen=_HISTORY_STEPS)
        self._k3: deque[float] = deque(maxlen=_HISTORY_STEPS)
        self._seconds: deque[float] = deque(maxlen=_TIMED_STEPS)

    def add(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Add the metrics of one step."""
        self._step, self._metrics = step, metrics
        skipped = reading(metrics, "optim/skipped")
        self._skipped += int(skipped) if skipped is not None and math.isfinite(skipped) else 0
        for history, name in (
            (self._reward, "rollout/reward/mean"),
            (self._k3, K3),
            (self._seconds, "time/step_seconds"),
        ):
            value = reading(metrics, name)
            if value is not None and math.isfinite(value):
                history.append(value)

    @property
    def started(self) -> bool:
        """True after the first step."""
        return self._step > 0

    @property
    def finished(self) -> bool:
        """True after the last step."""
        return self._step == self._total

    def line(self) -> str:
        """Return one aligned line, without markup."""
        width = len(str(self._total))
        k3 = reading(self._metrics, K3)
        return "  ".join(
            [
                *([self._label] if self._label else []),
                f"step {self._step:>{width}}/{self._total}",
                f"reward {self._cell('rollout/reward/mean', '.3f'):>5}",
                f"k3 {number(k3, '.1e'):>7} {health(K3, k3):<4}",
                f"|pi-mu| {number(max_gap(self._metrics), '.1e'):>7}",
                f"scale {self._cell('optim/loss_scale', '.0f'):>5}",
                f"skipped {self._skipped}",
                f"{self._cell('time/step_seconds', '.1f')} s",
                f"left {duration(self._seconds_left())}",
            ]
        )

    def panel(self, width: int = 80) -> Panel:
        """Return the live panel for a terminal of `width` columns."""
        title = f" {self._label or 'run'} "
        if self._step == 0:
            body: RenderableType = Text(f"step 1 of {self._total} is running ...", style="dim")
        else:
            body = Group(self._curves(), Text(""), self._facts(), Text(""), self._bar())
        return Panel(body, title=title, title_align="left", border_style="dim", width=min(80, width))

    def _curves(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for _ in range(4):
            table.add_column(no_wrap=True)
        reward = f"first {self._reward[0]:.3f}, best {max(self._reward):.3f}" if self._reward else ""
        table.add_row(
            "reward",
            Text(self._cell("rollout/reward/mean", ".3f"), style="bold"),
            Text(sparkline(self._reward, _SPARK_WIDTH), style="cyan"),
            Text(reward, style="dim"),
        )
        k3 = reading(self._metrics, K3)
        state = health(K3, k3)
        table.add_row(
            "mismatch k3",
            Text(number(k3, ".1e"), style="bold"),
            Text(sparkline([math.log10(value) for value in self._k3 if value > 0], _SPARK_WIDTH), style="cyan"),
            Text(f"{state}  ", style=_STYLES[state]) + Text(band_text(K3), style="dim"),
        )
        return table

    def _facts(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=False)
        for column in range(6):
            table.add_column(no_wrap=True, style="bold" if column % 2 else "", justify="left")
        skipped = Text(str(self._skipped), style="bold yellow" if self._skipped else "bold")
        table.add_row(
            "max |pi-mu|",
            number(max_gap(self._metrics), ".1e"),
            "loss scale",
            self._cell("optim/loss_scale", ".0f"),
            "skipped",
            skipped,
        )
        table.add_row(
            "entropy",
            self._cell("policy/entropy/mean", ".3f"),
            "length",
            self._cell("rollout/length/mean", ".1f"),
            "tokens/s",
            self._cell("system/tokens_per_second", ",.0f"),
        )
        table.add_row(
            "predicted ESS",
            self._cell("budget/predicted_ess", ".3f"),
            "observed",
            self._cell("budget/observed_ess", ".3f"),
            "max length",
            self._cell("budget/max_length", ",.0f"),
        )
        return table

    def _bar(self) -> Table:
        table = Table.grid(padding=(0, 2))
        pace = f"{self._cell('time/step_seconds', '.1f')} s a step, {duration(self._seconds_left())} left"
        bar = ProgressBar(total=self._total, completed=self._step, width=30)
        table.add_row(f"step {self._step}/{self._total}", bar, Text(pace, style="dim"))
        return table

    def _cell(self, name: str, spec: str) -> str:
        return number(reading(self._metrics, name), spec)

    def _seconds_left(self) -> float:
        if not self._seconds:
            return math.nan
        return (self._total - self._step) * sum(self._seconds) / len(self._seconds)


class PhaseProgress:
    """Progress of a phase without steps, such as an evaluation."""

    def __init__(self, shown: Callable[[int], None] = lambda done: None) -> None:
        """`shown` is called with the number of finished units whenever it changes."""
        self._shown = shown
        self.done = 0
        """Number of finished units."""

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units."""
        self.done += count
        self._shown(self.done)


@contextmanager
def progress(
    label: str, total: int, *, mode: OutputMode = "auto", stream: TextIO | None = None
) -> Iterator[PhaseProgress]:
    """Show the progress of a phase of `total` units: a bar on a terminal, a line at start and end elsewhere."""
    out = RichConsole(file=stream or sys.stderr, highlight=False)
    resolved = resolve_mode(mode, out)
    if resolved == "live":
        columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=out) as bar:
            task = bar.add_task(label, total=total)
            yield PhaseProgress(lambda done: bar.update(task, completed=done))
        return
    if resolved == "events":
        yield from _phase_events(label, total, stream or sys.stderr)
        return
    phase, start = PhaseProgress(), time.monotonic()
    if resolved == "lines":
        out.print(Text(f"{label}: 0/{total}"))
    yield phase
    if resolved == "lines":
        out.print(Text(f"{label}: {phase.done}/{total} in {duration(time.monotonic() - start)}"))


def _phase_events(label: str, total: int, out: TextIO) -> Iterator[PhaseProgress]:
    def shown(done: int) -> None:
        emit(out, {"phase": label, "done": done, "total": total})

    shown(0)
    yield PhaseProgress(shown)


def show_note(text: str, *, mode: OutputMode = "auto", stream: TextIO | None = None) -> None:
    """Show a note outside the steps of a run, such as the rows left out of its data.

    In the mode `quiet` nothing is shown, unless it is a warning.
    """
    out, warning = stream or sys.stderr, is_warning(text)
    if mode == "events" or (mode != "quiet" and events_wanted()):
        emit(out, {"warning" if warning else "note": text})
    elif warning or mode != "quiet":
        print(text, file=out)


def is_warning(text: str) -> bool:
    """Return True for a note that every mode shows."""
    return text.startswith("warning: ")


def resolve_mode(mode: OutputMode, out: RichConsole) -> OutputMode:
    """Resolve `auto` to `live` if `out` is a terminal that can move its cursor, and to `lines` otherwise.

    Every mode but `quiet` becomes `events` if the parent process asked for events.
    """
    if events_wanted() and mode != "quiet":
        return "events"
    if mode == "auto":
        return "live" if out.is_terminal and not out.is_dumb_terminal else "lines"
    return mode


def health(name: str, value: float | None) -> str:
    """Compare a value with the catalogue's healthy band: `ok`, `high` (NaN too) or `low`; empty without value or
    band."""
    band = CATALOGUE[name].band
    if value is None or band is None:
        return ""
    low, high = band
    if low is not None and value < low:
        return "low"
    # NaN compares false with everything, so this order of comparisons makes it unhealthy.
    return "ok" if high is None or value <= high else "high"


def band_text(name: str) -> str:
    """Return the healthy band in words; empty without one."""
    low, high = CATALOGUE[name].band or (None, None)
    if low is not None and high is not None:
        return f"healthy {low:g} to {high:g}"
    if high is not None:
        return f"healthy below {high:g}"
    return f"healthy above {low:g}" if low is not None else ""


def max_gap(metrics: Mapping[str, MetricValue]) -> float | None:
    """Return the largest |pi - mu| of a step, from the two signed extremes; None if neither was measured."""
    extremes = (reading(metrics, name) for name in ("mismatch/prob_gap/max", "mismatch/prob_gap/min"))
    gaps = [abs(value) for value in extremes if value is not None]
    return max(gaps) if gaps else None


def reading(metrics: Mapping[str, MetricValue], name: str) -> float | None:
    """Return the metric as a number; None if it is missing or not a number."""
    value = metrics.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def number(value: float | None, spec: str) -> str:
    """Format `value` by `spec`: a dash for None, `nan` and `inf` as they are."""
    if value is None:
        return "-"
    return format(value, spec) if math.isfinite(value) else str(float(value))


def duration(seconds: float) -> str:
    """Format seconds for people: `8s`, `1m09s`, `2h05m`; a dash if not finite."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw `values`, averaged into at most `width` columns, as block characters from the lowest to the highest."""
    if not values:
        return ""
    series = list(values)
    columns = min(width, len(series))
    edges = [round(index * len(series) / columns) for index in range(columns + 1)]
    means = [sum(series[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BLOCKS[round((mean - low) / span * 7) if span else 3] for mean in means)
