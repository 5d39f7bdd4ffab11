"""Compare ways for threads to wait, and two parallel runs with two in sequence.

    python benchmarks/waiting.py [--steps 5] [--repeats 3]

It times steps of the demo (`experiments/base/demo.toml`), each run in its own process, alternating. "Both arms" is the
time of a step of FP16 and one of BF16: in sequence with all threads, or in parallel with one thread each. The first
line shows how long a sleeping thread takes to wake here. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from side_by_side import Row, Table, parser

from betterhalf.process import SPIN_COUNT, idle_cores, wake_microseconds
from betterhalf.run_dir import read_jsonl

ROOT = Path(__file__).parents[1]
Run = subprocess.Popen[bytes]
SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
SPIN = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPIN_COUNT)}


def start(precision: str, threads: int, waiting: Mapping[str, str], steps: int, folder: Path) -> Run:
    """Start a short run of the demo in its own process."""
    settings = [f"training.steps={steps}", f"precision={precision}", f"run_dir={folder}", "logging.console=quiet"]
    command = [sys.executable, "-m", "betterhalf.cli", "train", str(ROOT / "experiments/base/demo.toml"), *settings]
    environment = {**os.environ, **waiting, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def step_seconds(precisions: Sequence[str], threads: int, waiting: Mapping[str, str], steps: int) -> list[float]:
    """Return the median seconds of a step of each run, all in parallel; the first step warms up."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, name) for name in precisions]
        pairs = zip(precisions, folders, strict=True)
        started = [start(name, threads, waiting, steps, folder) for name, folder in pairs]
        for process in started:
            if process.wait():
                raise SystemExit(f"a run ended with status {process.returncode}")
        return [
            statistics.median(row["time/step_seconds"] for row in read_jsonl(folder / "metrics.jsonl")[1:])
            for folder in folders
        ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=5, help="steps of each run")
    args = made.parse_args()
    print(f"a sleeping thread wakes in {wake_microseconds()} us; {idle_cores()} cores idle", flush=True)
    ways = {
        "fp16, all threads, sleeping": (("fp16",), args.threads, SLEEP),
        "fp16, all threads, spinning": (("fp16",), args.threads, SPIN),
        "bf16, all threads, sleeping": (("bf16",), args.threads, SLEEP),
        "bf16, all threads, spinning": (("bf16",), args.threads, SPIN),
        "side by side": (("fp16", "bf16"), 1, SLEEP),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, (precisions, threads, waiting) in ways.items():
            taken[name].append(max(step_seconds(precisions, threads, waiting, args.steps)))
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    table = Table("seconds")
    for precision in ("fp16", "bf16"):
        sleeping, spinning = (seconds[f"{precision}, all threads, {how}"] for how in ("sleeping", "spinning"))
        what = f"{precision} step, {args.threads} threads: spinning vs sleeping"
        table.add(Row(what=what, ours=spinning, peer=sleeping, target=1.0, better="lower"))
    for how in ("sleeping", "spinning"):
        both = sum(seconds[f"{precision}, all threads, {how}"] for precision in ("fp16", "bf16"))
        what = f"both arms: in parallel vs in sequence, {how}"
        table.add(Row(what=what, ours=seconds["side by side"], peer=both, target=1.0, better="lower"))
    table.end(args.json)


if __name__ == "__main__":
    main()
