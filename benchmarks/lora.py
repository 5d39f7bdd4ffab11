"""Compare a LoRA run with full fine-tuning on SmolLM2: time and memory of a training step, size of a checkpoint.

    python benchmarks/lora.py [--json] [--rank 16] [--model smollm2] [--tokens 512] [--cpu-time]

A step is one forward and backward pass with a loss on each token, and one optimizer step, as in training. The sides
alternate after a warm-up, and medians are compared. Memory is what the trainer's tensors hold after a step:
masters, gradients, optimizer states and computing weights, with those widened for FP32 products. The checkpoint is that
of the trainer's state: masters and optimizer states.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial

import torch
from packs import pack_of, random_ids
from side_by_side import Row, Table, parser, take_turns

from betterhalf.cluster.trained import policy_trainer
from betterhalf.config.schema import LoraConfig, ModelConfig, OptimizerConfig, PrecisionConfig, RunConfig
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.roles import build_precision
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import DtypeName

LOSS_SCALE = 2.0**10


def trainer_of(model: LoadedModel, dtype: DtypeName, rank: int) -> PolicyTrainer:
    """Return a trainer on a copy of the model; rank 0 trains all weights."""
    config = RunConfig(
        precision=PrecisionConfig(preset=dtype),
        lora=LoraConfig(rank=rank),
        optimizer=OptimizerConfig(learning_rate=1e-6),
    )
    precision = build_precision(config.precision, torch.device("cpu"))
    copied = replace(model, module=copy.deepcopy(model.module))
    return policy_trainer(copied, config, precision, trained=None, keep_reference=False)


def step(trainer: PolicyTrainer, token_ids_NL: torch.Tensor) -> None:
    """Take one training step."""
    (-trainer.score(pack_of(token_ids_NL)).mean() * LOSS_SCALE).backward()
    trainer.optim_step(1e-6)


def held_bytes(trainer: PolicyTrainer) -> int:
    """Return the bytes of the tensors that a trainer keeps between steps, each once."""
    state = trainer.state()
    tensors = [*trainer.module.parameters(), *state.model.values(), *state.optimizer.values()]
    tensors.append(trainer.head().logits_weight)
    tensors += [gradient for _, gradient in trainer.weights.gradients()]
    tensors += [part.weight_wide() for part in trainer.module.modules() if isinstance(part, CpuLinear)]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def checkpoint_bytes(trainer: PolicyTrainer) -> int:
    """Return the bytes of a checkpoint's tensors."""
    state = trainer.state()
    return sum(x.numel() * x.element_size() for x in (*state.model.values(), *state.optimizer.values()))


def main() -> None:
    """Print three rows for each precision."""
    made = parser(__doc__)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--model", default="smollm2")
    made.add_argument("--tokens", type=int, default=512, help="tokens of a pass")
    made.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a machine with other work")
    args = made.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    model = load_model(ModelConfig(name=args.model))
    ids = random_ids(model.hf_config.vocab_size, 1, args.tokens)
    table = Table("ours: LoRA, peer: all weights")
    for dtype in ("fp16", "bf16"):
        lora, full = (trainer_of(model, dtype, rank) for rank in (args.rank, 0))
        mine, theirs = take_turns(partial(step, lora, ids), partial(step, full, ids), repeats=args.repeats, clock=clock)
        table.add(
            Row(
                what=f"{dtype}: {'CPU ' if args.cpu_time else ''}seconds of a step",
                ours=mine,
                peer=theirs,
                target=1.0,
                better="lower",
            )
        )
        for what, count, target in (("held", held_bytes, 1.0), ("checkpoint", checkpoint_bytes, 20.0)):
            mine, theirs = (count(side) / 2**20 for side in (lora, full))
            table.add(Row(what=f"{dtype}: MiB {what}", ours=mine, peer=theirs, target=target, better="lower"))
    table.end(args.json)


if __name__ == "__main__":
    main()
