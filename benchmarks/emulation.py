"""Measure what an emulated format costs: a whole training step, against BF16.

    python benchmarks/emulation.py [--dtype e8m3] [--models demo tiny] [--repeats 15] [--json]

Steps of both formats alternate in one process. `tiny` has the demo's tokenizer and random weights, hidden size 64 and
2 layers. Completions ignore stop tokens, so that both formats sample and train the same number of tokens. `ours` is the
emulated format and `peer` is BF16, in seconds of processor time: a ratio above 0.67 is an overhead below 1.5. Rows
`without kernel` round with torch operations, as on a machine without a C compiler.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args
from unittest import mock

from side_by_side import Row, Table, parser, take_turns
from transformers import AutoConfig, AutoModelForCausalLM
from whole_step import Steps, open_parts, step_config

import betterhalf.models
from betterhalf.precision import emulation
from betterhalf.types import DtypeName, EmulatedDtype

TARGET = 1 / 1.5
"""Ratio of an overhead of 1.5."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}


@contextmanager
def model_named(name: str) -> Iterator[str]:
    """Yield the name of a model, or the folder of the model `tiny`, which is made here."""
    if name != "tiny":
        yield name
        return
    demo = Path(betterhalf.models.__path__[0], "demo")
    with tempfile.TemporaryDirectory() as folder:
        for file in demo.glob("*.json"):
            shutil.copy(file, folder)
        settings = json.loads((demo / "config.json").read_text()) | TINY
        Path(folder, "config.json").write_text(json.dumps(settings))
        make: Any = AutoModelForCausalLM.from_config
        make(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        yield folder


def add_row(table: Table, name: str, args: argparse.Namespace, *, kernel: bool) -> None:
    """Add the row of one model, with or without the compiled kernel."""
    sizes = {"prompts": args.prompts, "siblings": args.siblings, "tokens": args.tokens}
    formats: tuple[DtypeName, ...] = (args.dtype, "bf16")
    without = nullcontext() if kernel else mock.patch.object(emulation, "_kernels", lambda: None)
    with model_named(name) as model, without:
        parts = [open_parts(step_config(model, dtype, **sizes)) for dtype in formats]
        ours, peer = take_turns(*map(Steps, parts), repeats=args.repeats, clock=time.process_time, warm_up=2)
    for each in parts:
        each.close()
    what = f"{name}, step in {args.dtype} / in bf16{'' if kernel else ', without kernel'}"
    table.add(Row(what=what, ours=ours, peer=peer, target=TARGET if kernel else 0.0, better="lower"))


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(threads=1, repeats=15)
    made.add_argument("--models", nargs="+", default=["demo", "tiny"], help="`tiny`, or what the command line takes")
    made.add_argument("--dtype", default="e8m3", choices=get_args(EmulatedDtype))
    made.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    made.add_argument("--siblings", type=int, default=8, help="completions of each prompt")
    made.add_argument("--tokens", type=int, default=20, help="tokens of each completion")
    args = made.parse_args()
    table = Table("processor seconds")
    for kernel in (True, False):
        for name in args.models:
            add_row(table, name, args, kernel=kernel)
    table.end(args.json)


if __name__ == "__main__":
    main()
