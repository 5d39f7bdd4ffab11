"""Measure what a tracker costs a run: on its own thread, in its whole process, and when the tracker is killed or hangs.

    python benchmarks/tracking.py [--json] [--tracker tensorboard] [--steps 12]

Runs are not compared by their clocks, whose noise exceeds the bound of 2%. `ours` is the processor time per step that
handing rows over takes, on the thread that trains and on all threads of the process; `peer` is 2% of the median step.
The tracker's own process is killed after half of the steps. Its processor time is reported beside, with a target of 0.
"""

from __future__ import annotations

import os
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from side_by_side import Row, Table, parser

from betterhalf.config.load import configuration_of
from betterhalf.run_dir import read_jsonl
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


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tracker", default="tensorboard", choices=("wandb", "trackio", "mlflow", "tensorboard"))
    made.add_argument("--steps", type=int, default=12)
    args = made.parse_args()
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
