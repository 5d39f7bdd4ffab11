"""Run TRL's GRPOTrainer in FP16 and in BF16 with our callback: the mismatch in both, and the callback's cost.

    pip install 'betterhalf[trl,smollm2]'
    python benchmarks/trl_callback.py [--json] [--dtypes fp16 bf16] [--run-dir runs/trl]

Both runs have the same prompts, settings and FP32 master weights, and differ in the format of autocast alone. TRL
samples with transformers' `generate` (KV cache, one token at a time), and `record_generate` notes the logprobs of the
tokens as they are drawn; the trainer's logprobs are those of its own pass over whole completions, which TRL computes
anyway, because 4 optimizer steps follow each rollout batch. Completions ignore stop tokens.

On a CPU accelerate accepts `fp16=True` and enters no autocast. The script switches on what it does on a GPU: autocast
to FP16, and a GradScaler.

The rows: the processor seconds that the callback takes in a step, beside those it may take, a share of those of the
same step (medians without the first step, in which it reads the contract); and k3, also of each batch. Each run leaves
a folder for `betterhalf report`. Processor seconds are those of all threads of the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from overhead import Meter
from rl_step import Size, ignore_stop_tokens, require_same_tokens, reward_function, trl_config
from side_by_side import Row, Table, parser
from whole_step import add_sizes, step_config

from betterhalf.config.schema import RunConfig
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.setup.data import load_task
from betterhalf.types import DtypeName

SHARE = 0.02
"""Share of a step that the callback may take where TRL computes the trainer's logprobs anyway."""


Cost = tuple[float, float]
"""Processor seconds of the callback in a step, and of the whole step."""


def run(args: argparse.Namespace, dtype: DtypeName) -> list[Cost]:
    """Train for a few steps with the callback, and return its cost in each."""
    from betterhalf.integrations.trl import BetterhalfCallback

    size = Size(prompts=args.prompts, siblings=args.siblings, tokens=args.tokens)
    config = step_config(
        args.model, "fp32", prompts=size.prompts, siblings=size.siblings, tokens=size.tokens, updates=args.updates
    )
    trainer = trl_trainer(args, config, dtype, size, load_model(config.model))
    trainer.add_callback(BetterhalfCallback(trainer, folder(args, dtype).path, record_generate=True))
    with watched() as costs:
        trainer.train()
    return costs


def folder(args: argparse.Namespace, dtype: DtypeName) -> RunDir:
    return RunDir(Path(args.run_dir) / dtype)


def trl_trainer(args: argparse.Namespace, config: RunConfig, dtype: DtypeName, size: Size, model: LoadedModel) -> Any:
    """Return a trainer whose passes run under autocast to `dtype`."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    task = load_task(model, config, will_grade=False)
    prompts = task.prompts(0, args.steps * size.prompts, config.seed)
    require_same_tokens(model.tokenizer, prompts)
    halves = {"fp16": dtype == "fp16", "bf16": dtype == "bf16"}
    steps_each = {
        "max_steps": args.updates * args.steps,
        "per_device_train_batch_size": size.rollouts // args.updates,
        "steps_per_generation": args.updates,
        "learning_rate": args.learning_rate,
    }
    trainer = GRPOTrainer(
        model=model.module,
        reward_funcs=reward_function(task, prompts, "spread"),
        args=trl_config(config, size, args.steps, str(Path(args.run_dir) / "trl"), **halves, **steps_each),
        train_dataset=Dataset.from_dict({"prompt": [p.text for p in prompts], "index": list(range(len(prompts)))}),
        processing_class=model.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    ignore_stop_tokens(trainer)
    if dtype == "fp16":
        as_on_a_gpu(trainer)
    return trainer


def as_on_a_gpu(trainer: Any) -> None:
    """Give the trainer FP16 autocast and a loss scale, which accelerate leaves out on a CPU."""
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")


@contextmanager
def watched() -> Iterator[list[Cost]]:
    """Yield a list that gets the cost of each step of the block."""
    from betterhalf.integrations.trl.callback import BetterhalfCallback
    from betterhalf.integrations.trl.generate import DrawnLogprobs
    from betterhalf.integrations.trl.record import TrlRecord

    costs: list[Cost] = []
    begin, write = BetterhalfCallback._generate_and_score, TrlRecord.write_step
    started = 0.0

    def began(callback: BetterhalfCallback, inputs: Any) -> Any:
        nonlocal started
        started = time.process_time()
        return begin(callback, inputs)

    def noted(record: TrlRecord, step: int, metrics: Mapping[str, Any]) -> None:
        costs.append((math.fsum(meter.seconds.values()), time.process_time() - started))
        meter.seconds = {}  # what follows of this step, the writing, is counted in the next
        write(record, step, metrics)

    with (
        Meter(time.process_time) as meter,
        mock.patch.object(BetterhalfCallback, "_generate_and_score", began),
        mock.patch.object(TrlRecord, "write_step", noted),
    ):
        for name in ("_measure", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
            meter.watch(BetterhalfCallback, name, name)
        for name in ("__call__", "logprobs"):
            meter.watch(DrawnLogprobs, name, name)
        yield costs


def k3(args: argparse.Namespace, dtype: DtypeName) -> list[float]:
    """Return k3 of each batch of a run."""
    return [row["mismatch/k3/mean"] for row in read_jsonl(folder(args, dtype).metrics)]


def cost_row(dtype: DtypeName, costs: Sequence[Cost]) -> Row:
    """Return a row of the callback's seconds against those allowed, without the first step."""
    mine, step = (statistics.median(column) for column in zip(*costs[1:], strict=True))
    what = f"callback in a {dtype} step of TRL, CPU s: {mine / step:.2%}"
    return Row(what=what, ours=mine, peer=SHARE * step, target=1.0, better="lower")


def main() -> None:
    made = parser(__doc__)
    add_sizes(made)
    made.add_argument("--dtypes", nargs="+", default=["fp16", "bf16"], choices=["fp16", "bf16"])
    made.add_argument("--steps", type=int, default=4, help="rollout batches of each run, at least 2")
    made.add_argument("--updates", type=int, default=4, help="optimizer steps of each rollout batch")
    made.add_argument("--learning-rate", type=float, default=1e-6)
    made.add_argument("--run-dir", default="runs/trl", help="folder for one run folder of each format")
    args = made.parse_args()
    for package in ("trl", "datasets"):
        if importlib.util.find_spec(package) is None:
            made.error(f"this benchmark needs the package {package}; install it with `pip install 'betterhalf[trl]'`")
    torch.set_num_threads(args.threads)
    table = Table("s or nats")
    for dtype in args.dtypes:
        table.add(cost_row(dtype, run(args, dtype)))
        print(f"k3 {dtype}, by batch: {', '.join(f'{value:.3g}' for value in k3(args, dtype))} nats", flush=True)
    if set(args.dtypes) == {"fp16", "bf16"}:
        both = {"ours": statistics.fmean(k3(args, "fp16")), "peer": statistics.fmean(k3(args, "bf16"))}
        table.add(Row(what="k3 of fp16 (ours) and bf16, nats", **both, target=1.0, better="lower"))
    table.end(args.json)


if __name__ == "__main__":
    main()
