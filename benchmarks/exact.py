"""Cost of `engine.rounding=exact`: a step with it against a step with `engine` rounding, in one process, on a CPU.

    python benchmarks/exact.py [--model demo] [--dtypes fp16 fp32] [--json]

Both sides start from the same weights, sample completions of one length, and take turns. `ours` is exact, `peer` is
engine rounding: a ratio of 0.5 means that exact takes twice the time. `sample` is the rollout, `measure` the proximal
forward pass, `train` four optimizer steps, `step` everything, the weight sync and its verification included. The
largest absolute difference of the probabilities of trainer and engine, over all steps, is printed for both.
"""

from __future__ import annotations

import statistics
from typing import get_args

import torch
from side_by_side import Row, Table, parser
from whole_step import Steps, add_sizes, open_parts, step_config

from betterhalf.config.schema import RunConfig
from betterhalf.types import DtypeName

PARTS = {"sample": "generate", "measure": "measure", "train": "train", "step": "step"}
"""Label -> metric `time/<metric>_seconds`."""


def side(config: RunConfig, rounding: str) -> Steps:
    """Open a run of the same configuration with other rounding points."""
    return Steps(open_parts(RunConfig.model_validate(config.model_dump() | {"engine": {"rounding": rounding}})))


def seconds(found: list[dict[str, float | None]], metric: str) -> float:
    """Return the median seconds of one part of a step."""
    return statistics.median(float(row[f"time/{metric}_seconds"] or 0.0) for row in found)


def main() -> None:
    made = parser(__doc__)
    add_sizes(made)
    made.set_defaults(model="demo")
    made.add_argument("--dtypes", nargs="+", default=["fp16", "fp32"], choices=get_args(DtypeName))
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("seconds")
    for dtype in args.dtypes:
        config = step_config(args.model, dtype, prompts=args.prompts, siblings=args.siblings, tokens=args.tokens)
        sides = {rounding: side(config, rounding) for rounding in ("exact", "engine")}
        found: dict[str, list[dict[str, float | None]]] = {rounding: [] for rounding in sides}
        for turn in range(1 + args.repeats):
            for rounding, run in sides.items():
                metrics = run().metrics
                if turn:
                    found[rounding].append(metrics)
        for label, metric in PARTS.items():
            ours, peer = (seconds(found[rounding], metric) for rounding in ("exact", "engine"))
            table.add(Row(what=f"{args.model} {dtype} {label}", ours=ours, peer=peer, target=0.0, better="lower"))
        for rounding, rows in found.items():
            gaps = [abs(row[f"mismatch/prob_gap/{end}"] or 0.0) for row in rows for end in ("min", "max")]
            print(f"{args.model} {dtype} {rounding}: max |pi - mu| = {max(gaps):.3g}")
    table.end(args.json)


if __name__ == "__main__":
    main()
