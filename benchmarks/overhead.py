"""Measure the share of a training step that measuring the mismatch, verifying weights and recording take.

    python benchmarks/overhead.py [--json] [--dtype fp16]

Nothing is switched off, and runs are not compared with each other, since their noise exceeds one per cent: named
functions are timed inside real steps, and their time is divided by that of the step. `ours` is the additional seconds,
median over steps, and `peer` the allowed seconds, a share of the median step, so a ratio above 1 is within the share.
Rows with the target 0 have no bound; they are compared with the nearest one.

measurement     grpo needs the proximal forward anyway: only the statistics of the mismatch and the watchdog count.
                Zero-advantage groups need no proximal forward, but are measured too: when they are half of the groups,
                their forward counts. reinforce needs none at all: the whole measuring forward counts.
verification    a weight sync without the sending: digests and the scores of a prompt, on both sides. Its parts follow.
recording       metrics, rollouts and mismatch rows of a step (checkpoints are not counted), and the report, once a run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from side_by_side import Row, Table, parser
from whole_step import Steps, add_sizes, open_parts, step_config, with_rewards

from betterhalf.config.schema import RunConfig
from betterhalf.runs import loop, train, weight_sync
from betterhalf.runs.assembly import Parts
from betterhalf.runs.progress import Progress
from betterhalf.types import DtypeName, PresetName

MEASUREMENT, VERIFICATION, RECORDING = 0.02, 0.03, 0.01
"""Shares of a step that each may take."""

Seconds = dict[str, float]
"""Path of labels, as in `sync/load`, -> seconds."""


class Meter:
    """Seconds spent inside functions, by the path of labels under which they were called."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Read the time from `clock`."""
        self.seconds: Seconds = {}
        self._clock = clock
        self._inside: list[str] = []
        self._patches = ExitStack()

    def watch(self, owner: Any, name: str, label: str, only: Callable[..., bool] = lambda *_a, **_k: True) -> None:
        """Time `owner.name` where `only` of its arguments is true, until the end of the `with`."""
        inner = getattr(owner, name)

        def timed(*args: Any, **keywords: Any) -> Any:
            if not only(*args, **keywords):
                return inner(*args, **keywords)
            with self.time(label):
                return inner(*args, **keywords)

        self._patches.enter_context(mock.patch.object(owner, name, timed))

    @contextmanager
    def time(self, label: str) -> Iterator[None]:
        """Time a block under `label`, below those of the blocks around it."""
        self._inside.append(label)
        path, start = "/".join(self._inside), self._clock()
        try:
            yield
        finally:
            self.seconds[path] = self.seconds.get(path, 0.0) + self._clock() - start
            self._inside.pop()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_error: object) -> None:
        self._patches.close()


def watched_steps(parts: Parts, repeats: int) -> list[Seconds]:
    """Return the seconds by path of `repeats` steps after a warm-up; only steps that changed the weights count."""
    run, found = Steps(parts), []
    with Meter() as meter:
        _watch_measurement(meter, parts)
        _watch_sync(meter, parts)
        while len(found) <= repeats and run.progress.step < 5 * (1 + repeats):
            meter.seconds = {}
            with meter.time("step"):
                run()
            found += [meter.seconds] if "step/sync" in meter.seconds else []
    return found[1:]


def _watch_measurement(meter: Meter, parts: Parts) -> None:
    meter.watch(loop, "measure", "measure")
    meter.watch(parts.trainer, "_measure", "zero", only=lambda micro, *_: not bool(micro.advantages_S.any()))
    meter.watch(loop, "mismatch", "statistics")
    meter.watch(loop.watchdog, "check", "statistics")


def _watch_sync(meter: Meter, parts: Parts) -> None:
    meter.watch(loop, "sync_weights", "sync")
    meter.watch(parts.engine, "load_weights", "load")
    meter.watch(weight_sync, "tensor_digest", "digests sent")
    meter.watch(parts.engine, "digests", "digests held")
    meter.watch(weight_sync, "check_scores", "scores")


def share_row(what: str, steps: Sequence[Seconds], extra: Callable[[Seconds], float], share: float, bound: bool) -> Row:
    """Return a row of the median additional seconds against a share of the median step."""
    step = statistics.median(seconds["step"] for seconds in steps)
    mine = statistics.median(extra(seconds) for seconds in steps)
    what = f"{what}: {mine / step:.2%}"
    return Row(what=what, ours=mine, peer=share * step, target=1.0 if bound else 0.0, better="lower")


def statistics_alone(seconds: Seconds) -> float:
    return seconds["step/statistics"]


def with_zero_advantage(seconds: Seconds) -> float:
    return statistics_alone(seconds) + seconds.get("step/measure/zero", 0.0)


def with_forward(seconds: Seconds) -> float:
    return statistics_alone(seconds) + seconds["step/measure"]


def verification(seconds: Seconds) -> float:
    return seconds["step/sync"] - sending(seconds)


def sending(seconds: Seconds) -> float:
    """Return the seconds of a weight sync without the digests that are taken during it."""
    return seconds["step/sync/load"] - seconds[_SENT]


_SENT = "step/sync/load/digests sent"


def add_measurement(table: Table, args: argparse.Namespace) -> None:
    """Add the rows of the mismatch; the steps of the first one also give the rows of the weight sync."""
    cases: tuple[tuple[PresetName, float, Callable[[Seconds], float], bool], ...] = (
        ("grpo", 0.0, statistics_alone, True),
        ("grpo", 0.5, with_zero_advantage, False),
        ("reinforce", 0.0, with_forward, False),
        ("reinforce", 0.5, with_forward, False),
    )
    for preset in ("grpo", "reinforce"):
        parts = open_parts(config_of(args, preset))
        try:
            for _, equal_share, extra, bound in [case for case in cases if case[0] == preset]:
                steps = watched_steps(with_rewards(parts, equal_share), args.repeats)
                what = f"{preset}, {equal_share:.0%} zero-advantage, mismatch"
                table.add(share_row(what, steps, extra, MEASUREMENT, bound))
                if preset == "grpo" and not equal_share:
                    add_sync(table, steps)
        finally:
            parts.close()


def add_sync(table: Table, steps: Sequence[Seconds]) -> None:
    """Add the rows of the weight sync."""
    table.add(share_row("weight verification", steps, verification, VERIFICATION, True))
    for path in (_SENT, "step/sync/digests held", "step/sync/scores"):
        part = path.rpartition("/")[2]
        table.add(share_row(f"  {part}", steps, lambda seconds, path=path: seconds[path], VERIFICATION, False))
    table.add(share_row("weight sync without verification", steps, sending, VERIFICATION, False))


def add_recording(table: Table, args: argparse.Namespace) -> None:
    """Add the rows of recording, from a whole run in its own folder."""
    steps, report = recorded_run(config_of(args, "grpo"), args.repeats)
    table.add(share_row("metrics, rollouts, mismatch rows", steps, lambda s: s["record"], RECORDING, True))
    whole = [seconds | {"report": report} for seconds in steps]
    what = f"report of a run of {len(steps) + 1} steps, of one step"
    table.add(share_row(what, whole, lambda seconds: seconds["report"], RECORDING, False))


def recorded_run(config: RunConfig, repeats: int) -> tuple[list[Seconds], float]:
    """Return `step` and `record` of each step of a run except the first, and the seconds of its report."""
    data = config.model_dump()
    data["training"] |= {"steps": 1 + repeats, "checkpoint_every": 0}
    found: list[Seconds] = []
    with Meter() as meter, tempfile.TemporaryDirectory() as folder:

        def recorded(parts: Parts, progress: Progress, on_step: Callable[..., None]) -> Progress:
            def record(result: loop.StepResult) -> None:
                with meter.time("record"):
                    on_step(result)
                checkpoint = meter.seconds.get("record/checkpoint", 0.0)
                found.append({"step": meter.seconds["step"], "record": meter.seconds["record"] - checkpoint})
                meter.seconds = {}

            return loop.train_steps(parts, progress, record)

        meter.watch(loop, "train_step", "step")
        meter.watch(train, "save_checkpoint", "checkpoint")
        meter.watch(train, "write_report", "report")
        with mock.patch.object(train, "train_steps", recorded):
            train.train(RunConfig.model_validate(data), str(Path(folder) / "run"), resume=False)
        return found[1:], meter.seconds["report"]


def config_of(args: argparse.Namespace, preset: PresetName) -> RunConfig:
    sizes = {"prompts": args.prompts, "siblings": args.siblings, "tokens": args.tokens}
    return step_config(args.model, args.dtype, preset=preset, **sizes)


def main() -> None:
    made = parser(__doc__)
    add_sizes(made)
    made.add_argument("--dtype", default="fp16", choices=get_args(DtypeName))
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("seconds against the allowed seconds")
    add_measurement(table, args)
    add_recording(table, args)
    table.end(args.json)


if __name__ == "__main__":
    main()
