"""Measure the delay of a step by a checkpoint that is written in the background.

    python benchmarks/checkpoints.py [--json] [--model demo] [--dtype fp16] [--repeats 9]

Steps with and without a checkpoint alternate. In the first row, `ours` is the median of copying the state to host
memory and of the step during which its files are written, and `peer` that of the steps without. In the second row both
are the CPU time of the process, writing included: on a machine without a free core, no more than that is taken from a
step. The printed parts say how long the copy alone holds up a step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

from side_by_side import Row, Table, parser
from whole_step import Steps, add_sizes, open_parts, step_config

from betterhalf.run_dir import RunDir
from betterhalf.runs.checkpoints import Checkpoints
from betterhalf.types import DtypeName

TARGET = 0.95


def measure(steps: Steps, checkpoints: Checkpoints, repeats: int) -> dict[str, float]:
    """Return median seconds: of a step without and with a checkpoint, in both clocks, of the copy, and of the write."""
    taken: dict[str, list[float]] = {name: [] for name in ("plain", "saved", "plain_cpu", "saved_cpu", "copy", "write")}
    for repeat in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        steps()
        before, before_cpu = time.perf_counter(), time.process_time()
        checkpoints.save(steps.progress)
        copied = time.perf_counter()
        steps()
        ended = time.perf_counter()
        checkpoints.wait()
        if repeat == 0:  # fills caches
            continue
        taken["plain"].append(before - start)
        taken["saved"].append(ended - before)
        taken["plain_cpu"].append(before_cpu - start_cpu)
        taken["saved_cpu"].append(time.process_time() - before_cpu)
        taken["copy"].append(copied - before)
        taken["write"].append(_write_alone(checkpoints, steps))
    return {name: statistics.median(values) for name, values in taken.items()}


def _write_alone(checkpoints: Checkpoints, steps: Steps) -> float:
    """Return the seconds of a write beside which nothing runs."""
    checkpoints.save(steps.progress)
    start = time.perf_counter()
    checkpoints.wait()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    made = parser(__doc__)
    add_sizes(made)
    made.add_argument("--dtype", choices=get_args(DtypeName), default="fp16")
    options = made.parse_args()
    config = step_config(
        options.model, options.dtype, prompts=options.prompts, siblings=options.siblings, tokens=options.tokens
    )
    parts = open_parts(config)
    table = Table("s")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Steps(parts), Checkpoints(parts, RunDir(Path(folder))), options.repeats)
    for what, key in (("step with a checkpoint / without", ""), ("the same, CPU time", "_cpu")):
        row = Row(what=what, ours=found[f"saved{key}"], peer=found[f"plain{key}"], target=TARGET, better="lower")
        table.add(row)
    print(f"the copy holds a step up for {found['copy']:.3g} s; the files take {found['write']:.3g} s")
    parts.close()
    table.end(options.json)


if __name__ == "__main__":
    main()
