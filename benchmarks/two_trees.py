"""Two source trees side by side: are the numbers of a training step equal, and how long does a step take in each?

    python benchmarks/two_trees.py OLD [NEW] [--model demo] [--steps 8] [--repeats 5] [--json]

OLD and NEW are checkouts of this project; NEW is this one by default. Each runs whole steps (`whole_step.py` of its own
tree) in fresh processes, which take turns; the first step of a process warms up and is not timed. Every metric of every
step is compared bit for bit, except `time/` and `system/`. `ours` is NEW, `peer` is OLD.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side import Row, Table, parser
from whole_step import add_sizes

CHILD = """
import json, sys, time
import torch
from whole_step import Steps, open_parts, step_config
given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
sizes = {name: given[name] for name in ("prompts", "siblings", "tokens")}
run, rows = Steps(open_parts(step_config(given["model"], given["dtype"], **sizes))), []
for _ in range(1 + given["steps"]):
    start = time.perf_counter()
    metrics = run().metrics
    rows.append({"seconds": time.perf_counter() - start, "metrics": metrics})
print(json.dumps(rows))
"""


def steps_of(tree: Path, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return seconds and metrics of each step that the code of `tree` takes, the first one included."""
    paths = os.pathsep.join([str(tree / "benchmarks"), str(tree / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(given["threads"])}
    command = [sys.executable, "-c", CHILD, json.dumps(given)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def differing(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Return the number of values compared, and `step, metric: old -> new` of those that differ."""
    count, found = 0, []
    for step, (left, right) in enumerate(zip(old, new, strict=True), 1):
        for name in sorted(left["metrics"].keys() | right["metrics"].keys()):
            if name.startswith(("time/", "system/")):
                continue
            count += 1
            before, after = left["metrics"].get(name), right["metrics"].get(name)
            if json.dumps(before) != json.dumps(after):
                found.append(f"step {step}, {name}: {before} -> {after}")
    return count, found


def main() -> None:
    made = parser(__doc__)
    add_sizes(made)
    made.set_defaults(model="demo")
    made.add_argument("old", type=Path, help="checkout to compare with")
    made.add_argument("new", type=Path, nargs="?", default=Path(__file__).parents[1], help="checkout, by default this")
    made.add_argument("--dtype", default="fp16")
    made.add_argument("--steps", type=int, default=8, help="timed steps of each process")
    args = made.parse_args()
    names = ("model", "dtype", "prompts", "siblings", "tokens", "threads", "steps")
    given = {name: getattr(args, name) for name in names}
    seconds: dict[str, list[float]] = {"old": [], "new": []}
    for _ in range(args.repeats):
        rows = {side: steps_of(getattr(args, side).resolve(), given) for side in seconds}
        for side, found in rows.items():
            seconds[side] += [row["seconds"] for row in found[1:]]
        count, different = differing(rows["old"], rows["new"])
        print(f"{count} values compared, {len(different)} differ", *different[:10], sep="\n  ", flush=True)
    table = Table("seconds of a step, new against old")
    mine, theirs = (statistics.median(seconds[side]) for side in ("new", "old"))
    table.add(Row(what=f"{args.dtype} step of {args.model}", ours=mine, peer=theirs, target=0.95, better="lower"))
    table.end(args.json)


if __name__ == "__main__":
    main()
