"""Measure the growth of a step's time with the length of completions, their number, and the group size.

    python benchmarks/scaling.py [--json] [--dtype fp16]

One model, one size changed at a time, the sizes alternating; a power law is fitted to the median seconds. `ours` is the
factor by which doubling the size multiplies the time: 2 to the power of the fitted exponent. `peer` is the factor if
time were proportional to the size (2), or independent of it (1, for the group size at a constant number of sequences,
where a larger group shares its prompt). Fixed costs make factors smaller than their bound, so a good factor over small
sizes says little: the seconds are printed too. No other framework is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch
from side_by_side import Row, Table, parser, take_turns
from whole_step import Steps, open_parts, step_config, with_rewards

from betterhalf.config.schema import RunConfig
from betterhalf.runs.assembly import Parts
from betterhalf.types import DtypeName

LENGTHS = (16, 32, 64, 128)
SEQUENCES = (8, 16, 32, 64)
GROUPS = (2, 4, 8, 16, 32)
SEQUENCES_OF_GROUPS = 32
"""Number of sequences while the group size changes."""


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the b of seconds = a x size^b, by least squares in logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(taken) for taken in seconds]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - mean_x) ** 2 for a in x)


def resized(parts: Parts, *, prompts: int, siblings: int, tokens: int) -> Parts:
    """Return the same parts with another size of step; one model serves all sizes."""
    config = parts.config
    data = config.model_dump()
    data["training"] |= {"prompts_per_step": prompts, "group_size": siblings}
    data["sampling"] |= {"max_tokens": tokens}
    return with_rewards(replace(parts, config=RunConfig.model_validate(data)), equal_share=0.0)


def row(what: str, sizes: Sequence[int], actions: Sequence[Steps], repeats: int, proportional: float) -> Row:
    """Time the sizes alternately, and fit."""
    seconds = take_turns(*actions, repeats=repeats)
    exponent = fitted_exponent(sizes, seconds)
    print("  " + ", ".join(f"{size}: {taken:.3g} s" for size, taken in zip(sizes, seconds, strict=True)), flush=True)
    what = f"{what} {sizes[0]} to {sizes[-1]}: exponent {exponent:.2f}"
    return Row(what=what, ours=2**exponent, peer=proportional, target=0.95, better="lower")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--model", default="smollm2")
    made.add_argument("--dtype", default="fp16", choices=get_args(DtypeName))
    made.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    made.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES, help="multiples of 8, the group size")
    made.add_argument("--groups", type=int, nargs="+", default=GROUPS, help=f"divisors of {SEQUENCES_OF_GROUPS}")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    parts = open_parts(step_config(args.model, args.dtype, prompts=4, siblings=8, tokens=64), reward="task")
    by_length = [Steps(resized(parts, prompts=4, siblings=8, tokens=length)) for length in args.lengths]
    by_number = [Steps(resized(parts, prompts=number // 8, siblings=8, tokens=64)) for number in args.sequences]
    by_group = [
        Steps(resized(parts, prompts=SEQUENCES_OF_GROUPS // size, siblings=size, tokens=64)) for size in args.groups
    ]
    try:
        table = Table("factor when doubled")
        table.add(row("completion tokens", args.lengths, by_length, args.repeats, 2.0))
        table.add(row("sequences", args.sequences, by_number, args.repeats, 2.0))
        table.add(row(f"siblings, {SEQUENCES_OF_GROUPS} sequences,", args.groups, by_group, args.repeats, 1.0))
        table.end(args.json)
    finally:
        parts.close()


if __name__ == "__main__":
    main()
