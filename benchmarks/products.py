"""Time matrix products of SmolLM2's shapes on a CPU: the library we use against torch's own choice (MKL in FP32).

    python benchmarks/products.py [--json] [--dtype bf16]

One row for each shape and number of rows: a decode step's (32) with the packed weight, and a training pass's (512)
forward and for both gradients, with plain operands. The sides alternate; numbers are GFLOP/s. Ours is oneDNN for packed
weights, and for plain ones except on Intel's processors, where both sides are MKL. In BF16 torch uses oneDNN too, and
only the packing differs.

Then attention: the batched products of a block of queries, and the whole forward and backward pass of the trainer's
blocked attention against torch's fused kernel, for one long sequence and for many short ones.
"""

from __future__ import annotations

from typing import get_args

import torch
from side_by_side import Action, Row, Table, parser, take_turns
from torch import Tensor
from torch.nn import functional as F

from betterhalf.models.blocked_attention import ScoreRule, blocked_attention
from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.products import batched_product, packed, product
from betterhalf.types import DtypeName

WEIGHTS = {"qkv": (960, 576), "output": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
"""Layer -> (outputs, inputs), of SmolLM2-135M."""
HEAD_DIM = 64
ATTENTION = ((1, 512), (4, 128), (16, 104), (1, 2048))
"""(sequences, length) of attention with 9 query heads and 3 key heads."""
TURNS = 10
"""Number of products in a turn."""


def sides(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, tuple[Action, Action]]:
    """Return name -> (our product, torch's)."""
    x, grad, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (rows, outputs), (outputs, inputs)))
    in_blocks = packed(weight)
    return {
        "packed": (lambda: product(x, in_blocks), lambda: x @ weight.t()),
        "forward": (lambda: product(x, weight), lambda: x @ weight.t()),
        "grad input": (lambda: product(grad, weight.t()), lambda: grad @ weight),
        "grad weight": (lambda: product(grad.t(), x.t()), lambda: grad.t() @ x),
    }


def batches() -> dict[str, tuple[Action, Action]]:
    """Return name -> (our batched FP32 product, torch's), for 3 key heads, 3 x 128 queries and 512 keys."""
    q, k, p = torch.randn(3, 384, HEAD_DIM), torch.randn(3, 512, HEAD_DIM), torch.rand(3, 384, 512)
    return {
        "scores": (lambda: batched_product(q, k.transpose(1, 2)), lambda: torch.bmm(q, k.transpose(1, 2))),
        "values": (lambda: batched_product(p, k), lambda: torch.bmm(p, k)),
        "grad keys": (lambda: batched_product(p.transpose(1, 2), q), lambda: torch.bmm(p.transpose(1, 2), q)),
    }


def attention(sequences: int, length: int, dtype: torch.dtype) -> tuple[Action, Action]:
    """Return forward and backward of one layer's attention: ours, torch's."""

    def heads(count: int) -> Tensor:
        return torch.randn(sequences, count, length, HEAD_DIM).to(dtype).requires_grad_()

    q, k, v, scale = heads(9), heads(3), heads(3), HEAD_DIM**-0.5
    grad = torch.randn(q.shape).to(dtype)

    def learn(out: Tensor) -> None:
        out.backward(grad)  # type: ignore[no-untyped-call]
        q.grad = k.grad = v.grad = None

    def ours() -> None:
        learn(blocked_attention(q.float(), k.float(), v.float(), ScoreRule(scale=scale), operands=dtype).to(dtype))

    return ours, lambda: learn(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def repeated(action: Action) -> Action:
    """Repeat a call until a turn is long enough to time."""

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
    for what, pair in batches().items() if args.dtype == "fp32" else ():
        mine, theirs = take_turns(*map(repeated, pair), repeats=args.repeats)
        work = 2e-9 * 3 * 384 * HEAD_DIM * 512 * TURNS
        table.add(Row(what=f"{args.dtype} attention, {what}", ours=work / mine, peer=work / theirs, target=1.0))
    for sequences, length in ATTENTION:
        mine, theirs = take_turns(
            *map(repeated, attention(sequences, length, torch_dtype(args.dtype))), repeats=args.repeats
        )
        work = 1e-9 * 7 * sequences * 9 * length**2 * HEAD_DIM * TURNS
        what_row = f"{args.dtype} attention, {sequences} x {length} tokens, both passes"
        table.add(Row(what=what_row, ours=work / mine, peer=work / theirs, target=1.0))
    table.end(args.json)


if __name__ == "__main__":
    main()
