"""FP32 matrix products of SmolLM2's shapes on a CPU: oneDNN, which ours uses, against torch's own choice (MKL).

    python benchmarks/products.py [--json] [--dtype bf16]

One row for each shape and number of rows: a decode step's (32) by the packed weight, a training pass's (512) forward
and for both gradients, with plain operands. The sides take turns; GFLOP/s. In BF16 torch uses oneDNN too, and only the
packing differs.
"""

from __future__ import annotations

from typing import get_args

import torch
from side_by_side import Action, Row, Table, parser, take_turns

from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.products import packed, product
from betterhalf.types import DtypeName

WEIGHTS = {"qkv": (960, 576), "output": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
"""Of SmolLM2-135M: outputs, inputs."""
TURNS = 10
"""Products in a turn."""


def sides(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, tuple[Action, Action]]:
    """What is multiplied -> our product, and torch's."""
    x, grad, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (rows, outputs), (outputs, inputs)))
    in_blocks = packed(weight)
    return {
        "packed": (lambda: product(x, in_blocks), lambda: x @ weight.t()),
        "forward": (lambda: product(x, weight), lambda: x @ weight.t()),
        "grad input": (lambda: product(grad, weight.t()), lambda: grad @ weight),
        "grad weight": (lambda: product(grad.t(), x.t()), lambda: grad.t() @ x),
    }


def repeated(action: Action) -> Action:
    """So many calls that a turn is long enough to time."""

    def run() -> None:
        for _ in range(TURNS):
            action()

    return run


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--dtype", default="fp32", choices=[name for name in get_args(DtypeName) if name != "fp16"])
    made.add_argument("--rows", type=int, nargs="+", default=(32, 512))
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("GFLOP/s")
    for rows in args.rows:
        for name, (outputs, inputs) in WEIGHTS.items():
            for what, pair in sides(rows, outputs, inputs, torch_dtype(args.dtype)).items():
                if (what == "packed") == (rows < 256):
                    mine, theirs = take_turns(*map(repeated, pair), repeats=args.repeats)
                    work = 2e-9 * rows * outputs * inputs * TURNS
                    what_row = f"{args.dtype} {name}, {rows} rows, {what}"
                    table.add(Row(what=what_row, ours=work / mine, peer=work / theirs, target=1.0))
    table.end(args.json)


if __name__ == "__main__":
    main()
