"""Measure what a tracker costs a run: on its own thread, in its whole process, and when the tracker is killed or hangs.

    python benchmarks/tracking.py [--json] [--tracker tensorboard] [--steps 12]
    python benchmarks/tracking.py --kill [--pairs 5] [--json] [--tracker tensorboard] [--steps 12]

Without `--kill`, `ours` is the processor time per step that handing rows over takes, on the thread that trains and on
all threads of the process; `peer` is 2% of the median step. The tracker's own process is killed after half of the
steps. Its processor time is reported beside, with a target of 0.

With `--kill`, pairs of whole runs are compared, in turns: one without a tracker (`peer`), and one whose tracker is
killed after half of the steps (`ours`). Times are processor seconds of the process that trains, all of its threads.
Both sides do the same work in a step, so each step counts with its least time over the pairs, which other load on the
machine disturbs least: the rows add up the steps after the kill, and all but the first. A target allows 2% more. The
same sums of either half of the runs without a tracker are compared, too: a difference near theirs means nothing. The
third row has no such noise: the time of all threads but the one that trains, in the worst step, the kill included,
against 2% of the median step. The metrics have to be equal.
"""

from __future__ import annotations

import os
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from side_by_side import Row, Table, parser

from betterhalf.config.load import configuration_of
from betterhalf.run_dir import read_jsonl
from betterhalf.runs.loop import StepResult
from betterhalf.runs.record import StepRecorder
from betterhalf.runs.train import train
from betterhalf.tracking import feed
from betterhalf.tracking.tracking import Tracking

ALLOWED = 0.02
SMOKE = Path(__file__).parents[1] / "experiments" / "smoke" / "demo.toml"


class Spent:
    """Processor seconds of the calls that hand rows to trackers."""

    def __init__(self, kill_at: int) -> None:
        self.training = 0.0
        self.threads = 0.0
        self._kill_at = kill_at

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.training += time.thread_time() - started

        return timed

    def log(self, real: Callable[..., Any]) -> Callable[..., Any]:
        timed = self.around(real)

        def log(tracking: Tracking, step: int, metrics: Any) -> None:
            timed(tracking, step, metrics)
            if step == self._kill_at:
                for one in tracking._feeds:
                    os.kill(one.pid, signal.SIGKILL)

        return log

    def thread(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> None:
            real(*arguments)
            self.threads += time.thread_time()

        return run


def measure(tracker: str, steps: int, kill_at: int) -> tuple[Spent, float, float]:
    """Return what a run of `steps` spent on its tracker, its median step, and the tracker's processor seconds."""
    spent = Spent(kill_at)
    settings = {"trackers": [tracker], "mode": "offline", "console": "quiet"}
    config = configuration_of(SMOKE, {"training": {"steps": steps}, "logging": settings})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Tracking, "log", spent.log(Tracking.log)):
        with (
            mock.patch.object(feed.Feed, "_write", spent.thread(feed.Feed._write)),
            mock.patch.object(feed.Feed, "_read", spent.thread(feed.Feed._read)),
        ):
            train(config, str(Path(folder) / "run"), resume=False)
        rows = read_jsonl(Path(folder) / "run" / "metrics.jsonl")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, statistics.median(row["time/step_seconds"] for row in rows), child


def killed_run(tracker: str | None, steps: int, folder: Path) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """Train, and kill the tracker after half of the steps.

    Return the processor seconds of each step but the first, those of them that are not of this thread, and the rows of
    the metrics.
    """
    ends: list[float] = []
    here: list[float] = []
    record = StepRecorder.record

    def recorded(recorder: StepRecorder, result: StepResult) -> None:
        record(recorder, result)
        ends.append(time.process_time())
        here.append(time.thread_time())
        if len(ends) == steps // 2:
            for one in recorder._tracking._feeds:
                os.kill(one.pid, signal.SIGKILL)

    settings = {"trackers": [tracker] if tracker else [], "mode": "offline", "console": "quiet"}
    config = configuration_of(SMOKE, {"training": {"steps": steps}, "logging": settings})
    with mock.patch.object(StepRecorder, "record", recorded):
        train(config, str(folder), resume=False)
    rows = [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    seconds = [end - start for start, end in pairwise(ends)]
    others = [step - (end - start) for step, (start, end) in zip(seconds, pairwise(here), strict=True)]
    return seconds, others, rows


def least(runs: Sequence[Sequence[float]], first: int) -> float:
    """Return the sum over the steps from `first` on of each step's least seconds."""
    return sum(min(step) for step in list(zip(*runs, strict=True))[first:])


def compare_killed(tracker: str, steps: int, pairs: int, table: Table) -> None:
    """Add the rows of `--kill`."""
    alone, killed, elsewhere, rows = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        killed_run(None, 2, Path(folder) / "warm-up")
        for pair in range(pairs):
            # Each side comes first in half of the pairs.
            for name in (None, tracker) if pair % 2 else (tracker, None):
                seconds, others, metrics = killed_run(name, steps, Path(folder) / f"{pair}-{name}")
                (killed if name else alone).append(seconds)
                elsewhere += others if name else []
                rows.append(metrics)
    if any(metrics != rows[0] for metrics in rows):
        raise SystemExit("the metrics of a run whose tracker was killed differ from those without a tracker")
    for what, first in (("steps after the kill", steps // 2 - 1), ("all steps but the first", 0)):
        ours, peer = least(killed, first), least(alone, first)
        halves = least(alone[::2], first) / least(alone[1::2], first) - 1
        what = f"{what}: {ours / peer - 1:+.2%} (halves {halves:+.1%})"
        table.add(Row(what=what, ours=ours, peer=peer, target=1 / (1 + ALLOWED), better="lower"))
    allowed = ALLOWED * statistics.median(step for run in alone for step in run)
    table.add(Row(what="other threads, worst step", ours=max(elsewhere), peer=allowed, target=1.0, better="lower"))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tracker", default="tensorboard", choices=("wandb", "trackio", "mlflow", "tensorboard"))
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--kill", action="store_true", help="compare whole runs with a killed tracker and without one")
    made.add_argument("--pairs", type=int, default=5, help="pairs of runs of --kill, at least 2")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    if args.kill:
        table = Table("processor seconds")
        compare_killed(args.tracker, args.steps, args.pairs, table)
        table.end(args.json)
        return
    table = Table("processor seconds per step against 2% of a step")
    for what, kill_at in (("sending", 0), ("killed", args.steps // 2)):
        spent, step, child = measure(args.tracker, args.steps, kill_at)
        allowed = ALLOWED * step
        for name, ours, peer, target in (
            ("training thread", spent.training / args.steps, allowed, 1.0),
            ("all threads", (spent.training + spent.threads) / args.steps, allowed, 1.0),
            ("process of the tracker, whole run, against a step", child, step, 0.0),
        ):
            table.add(Row(what=f"{what}: {name}", ours=ours, peer=peer, target=target, better="lower"))
    table.end(args.json)


if __name__ == "__main__":
    main()
