"""Common parts of the benchmarks: two sides that alternate in one run, medians, a table, one JSON line.

The machines are noisy, so only ratios of one run count, and the two sides alternate after a warm-up. A ratio above 1
always means that ours is better, whether the numbers are speeds or seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from betterhalf.process import choose_threads, variables

_CHOSEN = "BETTERHALF_BENCHMARK_THREADS"
"""Environment variable that passes the choice to the restarted script."""


def choose() -> str:
    """Choose threads and waiting as the command line does, for both sides; return the choice.

    torch reads its settings when it is loaded, and the scripts import it first: so the script is restarted with them.
    Peers in other processes inherit them.
    """
    threads = choose_threads(os.environ)
    if _CHOSEN in os.environ or threads.waiting == "as set":
        return os.environ.get(_CHOSEN, str(threads))
    os.environ.update(variables(threads) | {_CHOSEN: str(threads)})
    os.execv(sys.executable, [sys.executable, *sys.argv])


THREADS = choose() if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent else "not chosen"

Action = Callable[[], Any]
Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison."""

    what: str
    ours: float
    peer: float
    target: float
    """Smallest ratio that is good enough."""
    better: Better = "higher"
    """`higher` for speeds, `lower` for seconds and bytes."""

    @property
    def ratio(self) -> float:
        """Ratio of the two sides; above 1, ours is better."""
        return self.ours / self.peer if self.better == "higher" else self.peer / self.ours

    def as_json(self) -> dict[str, str | float]:
        """Return the row as it appears in the last line of output."""
        return {"what": self.what, "ours": self.ours, "peer": self.peer, "ratio": self.ratio, "target": self.target}


def seconds_of(action: Action, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that one call takes."""
    start = clock()
    action()
    return clock() - start


def take_turns(
    *sides: Action, repeats: int, clock: Callable[[], float] = time.perf_counter, warm_up: int = 1
) -> tuple[float, ...]:
    """Return the median seconds of each side, measured alternately after `warm_up` calls of each."""
    for _ in range(warm_up):
        for side in sides:
            side()
    taken = [[seconds_of(side, clock) for side in sides] for _ in range(repeats)]
    return tuple(statistics.median(times) for times in zip(*taken, strict=True))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repeats", type=int, default=3, help="timed turns of each side; medians count")
    made.add_argument("--json", action="store_true", help="print the rows as JSON on the last line")
    return made


class Table:
    """Rows, printed as they are added."""

    def __init__(self, unit: str) -> None:
        """Print the heading; `unit` is that of the numbers, such as `tokens/s`."""
        self.rows: list[Row] = []
        print(THREADS)
        print(f"{'what (' + unit + ')':<58} {'ours':>10} {'peer':>10} {'ratio':>8} {'target':>7}", flush=True)

    def add(self, row: Row) -> None:
        """Print and keep a row."""
        self.rows.append(row)
        met = "" if row.ratio >= row.target else "  below"
        numbers = f"{_short(row.ours):>10} {_short(row.peer):>10} {row.ratio:>8.3g} {row.target:>7.3g}"
        print(f"{row.what:<58} {numbers}{met}", flush=True)

    def end(self, as_json: bool) -> None:
        """Print the JSON line if it is requested."""
        if as_json:
            print_rows(self.rows)


def print_rows(rows: Sequence[Row]) -> None:
    """Return all rows as one JSON object."""
    print(json.dumps({"rows": [row.as_json() for row in rows]}), flush=True)


def _short(value: float) -> str:
    return f"{value:.4g}"
