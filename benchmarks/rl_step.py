"""Time a whole step of reinforcement learning: ours against TRL's GRPOTrainer, in the same process, on a CPU.

    pip install 'betterhalf[bench]'
    python benchmarks/rl_step.py [--json] [--dtypes fp32 fp16]

Both sides have the same model and starting weights, prompts in the same order, siblings, temperature 1, completions of
one length (stop tokens are ignored), rewards, Dr. GRPO's loss (clip 0.2 / 0.28, no KL term, no scaling of rewards), and
4 optimizer steps of fused AdamW for each rollout batch at the same constant learning rate. A step is generation,
rewards, the forward pass for proximal logprobs (both need it) and the optimizer steps. Ours also includes the
measurement of the mismatch and the verified weight sync; TRL samples with the trained module itself and has neither.

The sides alternate: after each of TRL's rollout batches a callback runs one of our steps, whose time is subtracted from
TRL's. TRL samples with `generate`, without vLLM, without gradient checkpointing (its default, slower), and without
logging. Texts, and so rewards, differ, because each side has its own random generator.

--reward spread (default) rewards every sibling differently, so that both sides train on all rollouts. With `task` many
groups get no reward at all; ours skips them and TRL does not, which makes the ratio larger.

FP32 is FP32 throughout, without autocast. On a CPU TRL accepts `fp16=True`, but accelerate enters no autocast, and the
trained weights equal those of FP32 bit for bit: it would not be FP16. So TRL gets FP16 weights, and AdamW has FP16
states: worse numerics than ours (FP32 masters, loss scale), and less memory traffic. If they end in NaN, use
--learning-rate 0, which takes the same time. torch is about twenty times slower in FP16 on a CPU; --fp16-prompts,
--fp16-siblings and --fp16-tokens make those steps small.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from side_by_side import Row, Table, parser
from whole_step import Reward, Steps, add_sizes, open_parts, spread_reward, step_config

from betterhalf.config.schema import RunConfig
from betterhalf.models.loading import load_model
from betterhalf.precision.formats import torch_dtype
from betterhalf.tasks.task import Task
from betterhalf.types import DtypeName, Prompt

UPDATES = 4
"""Optimizer steps for each rollout batch."""
TARGET = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of one step."""

    prompts: int
    siblings: int
    tokens: int

    @property
    def rollouts(self) -> int:
        return self.prompts * self.siblings


class Turns:
    """Seconds of both sides, step by step."""

    def __init__(self, ours: Callable[[], Any]) -> None:
        self._ours, self._updates, self._mark = ours, 0, 0.0
        self.mine: list[float] = []
        self.theirs: list[float] = []

    def begin(self) -> None:
        """Start the clock of TRL's first step."""
        self._mark = time.perf_counter()

    def next_update(self) -> None:
        """Run our step after TRL's last optimizer step of a rollout batch."""
        self._updates += 1
        if self._updates % UPDATES:
            return
        end_of_theirs = time.perf_counter()
        self._ours()
        end_of_mine = time.perf_counter()
        self.theirs.append(end_of_theirs - self._mark)
        self.mine.append(end_of_mine - end_of_theirs)
        self._mark = end_of_mine


def compare(args: argparse.Namespace, dtype: DtypeName, size: Size) -> Row:
    """Return a row of the median seconds of a step of both sides, without the first `--warm-up` steps."""
    config = our_config(args, dtype, size)
    parts = open_parts(config, args.reward)
    ours = Steps(parts)
    turns = Turns(ours)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(args, dtype, size, parts.task, folder)
            trainer.add_callback(callback(turns))
            lengths = watch_lengths(trainer)
            trainer.train()
    finally:
        parts.close()
    assert lengths == {size.tokens}, f"TRL sampled completions of {lengths} tokens"
    if ours.skipped:
        print(f"note: {ours.skipped} of our optimizer steps found gradients that were not finite, and were skipped")
    mine, theirs = (statistics.median(times[args.warm_up :]) for times in (turns.mine, turns.theirs))
    what = f"{dtype} step vs TRL {dtype}, {size.prompts} x {size.siblings} x {size.tokens} tokens, s"
    return Row(what=what, ours=mine, peer=theirs, target=TARGET, better="lower")


def our_config(args: argparse.Namespace, dtype: DtypeName, size: Size) -> RunConfig:
    config = step_config(
        args.model, dtype, prompts=size.prompts, siblings=size.siblings, tokens=size.tokens, updates=UPDATES
    )
    data = config.model_dump()
    data["optimizer"] |= {"learning_rate": args.learning_rate}
    return RunConfig.model_validate(data)


# -- TRL


def trl_trainer(args: argparse.Namespace, dtype: DtypeName, size: Size, task: Task, folder: str) -> Any:
    """Return TRL's trainer of the same model, ready to run the same steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL does not know this version of vLLM, but does not use it either
        from trl import GRPOTrainer
    from datasets import Dataset
    from transformers import PrinterCallback

    steps = args.warm_up + args.repeats
    config = our_config(args, dtype, size)
    prompts = task.prompts(0, steps * size.prompts, config.seed)
    model = load_model(config.model)
    require_same_tokens(model.tokenizer, prompts)
    trainer = GRPOTrainer(
        model=in_dtype(model.module, dtype),
        reward_funcs=reward_function(task, prompts, args.reward),
        args=trl_config(config, size, steps, folder),
        train_dataset=Dataset.from_dict({"prompt": [p.text for p in prompts], "index": list(range(len(prompts)))}),
        processing_class=model.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    ignore_stop_tokens(trainer)
    return trainer


def trl_config(config: RunConfig, size: Size, steps: int, folder: str, **changes: Any) -> Any:
    """Return our settings under TRL's names, with `changes`."""
    from trl import GRPOConfig

    optimizer = config.optimizer
    settings = {
        "output_dir": folder,
        "max_steps": UPDATES * steps,
        "per_device_train_batch_size": size.rollouts // UPDATES,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": UPDATES,
        "num_generations": size.siblings,
        "max_completion_length": size.tokens,
        "temperature": config.sampling.temperature,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "seed": config.seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return GRPOConfig(**settings | changes)


def in_dtype(module: Any, dtype: DtypeName) -> Any:
    """Return the module with its parameters in `dtype`; rope's tables stay FP32, as after loading by transformers."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch_dtype(dtype))
    return module


def ignore_stop_tokens(trainer: Any) -> None:
    """Let every completion run to its full length; TRL has no option for it."""
    trainer.eos_token_ids = [-1]
    trainer.generation_kwargs["eos_token_id"] = None
    trainer.generation_config.eos_token_id = None
    trainer.model.generation_config.eos_token_id = None


def reward_function(task: Task, prompts: list[Prompt], reward: Reward) -> Callable[..., list[float]]:
    """Return the same rewards as on our side."""

    def spread(completions: list[str], **_columns: Any) -> list[float]:
        return [spread_reward(index, text) for index, text in enumerate(completions)]

    def by_task(completions: list[str], index: list[int], **_columns: Any) -> list[float]:
        return task.rewards([prompts[i] for i in index], completions, ["length"] * len(completions))

    return spread if reward == "spread" else by_task


def require_same_tokens(tokenizer: Any, prompts: list[Prompt]) -> None:
    """Exit unless TRL, which tokenizes the prompts' texts itself, gets the same tokens."""
    found = tokenizer(text=[prompt.text for prompt in prompts])["input_ids"]
    if [tuple(ids) for ids in found] != [prompt.token_ids for prompt in prompts]:
        raise SystemExit("TRL would read other tokens than ours for this model's prompts; choose another model.")


def callback(turns: Turns) -> Any:
    """Return a callback of transformers' Trainer that alternates the sides."""
    from transformers import TrainerCallback

    class AtStepEnd(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_keywords: Any) -> None:
            turns.begin()

        def on_step_end(self, *_args: Any, **_keywords: Any) -> None:
            turns.next_update()

    return AtStepEnd()


def watch_lengths(trainer: Any) -> set[int]:
    """Collect the lengths of all completions that TRL samples from now on."""
    lengths: set[int] = set()
    inner = trainer._generate_single_turn

    def watched(*args: Any, **keywords: Any) -> Any:
        completion_ids, logprobs = inner(*args, **keywords)
        lengths.update(map(len, completion_ids))
        return completion_ids, logprobs

    trainer._generate_single_turn = watched
    return lengths


def sizes(args: argparse.Namespace) -> dict[DtypeName, Size]:
    usual = Size(prompts=args.prompts, siblings=args.siblings, tokens=args.tokens)
    small = Size(prompts=args.fp16_prompts, siblings=args.fp16_siblings, tokens=args.fp16_tokens)
    return {"fp32": usual, "bf16": usual, "fp16": small}


def main() -> None:
    made = parser(__doc__)
    add_sizes(made)
    made.add_argument("--fp16-prompts", type=int, default=2, help="prompts of a step in torch's slow FP16")
    made.add_argument("--fp16-siblings", type=int, default=4)
    made.add_argument("--fp16-tokens", type=int, default=16)
    made.add_argument("--dtypes", nargs="+", default=["fp32", "fp16"], choices=get_args(DtypeName))
    made.add_argument("--reward", default="spread", choices=get_args(Reward))
    made.add_argument("--learning-rate", type=float, default=1e-6)
    made.add_argument("--warm-up", type=int, default=1, help="steps of each side that do not count")
    args = made.parse_args()
    for package in ("trl", "datasets"):
        if importlib.util.find_spec(package) is None:
            made.error(f"this benchmark needs the package {package}; install it with `pip install 'betterhalf[bench]'`")
    torch.set_num_threads(args.threads)
    table = Table("seconds")
    for dtype in args.dtypes:
        size = sizes(args)[dtype]
        if size.rollouts % UPDATES:
            made.error(f"{size.rollouts} rollouts of a step cannot be split into {UPDATES} optimizer steps")
        table.add(compare(args, dtype, size))
    table.end(args.json)


if __name__ == "__main__":
    main()
