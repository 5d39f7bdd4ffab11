"""Forward and backward pass of SmolLM2-135M on a CPU: our FP16 (half grid, FP32 sums) against torch's FP16 and FP32.

    python benchmarks/train_pass.py [--json]

Ours is the trainer's own pass: packed attention, FP32 logprobs in chunks, half gradients added to FP32 masters. The
peers are the plain transformers module, in torch's own FP16 and in FP32, with its own loss. Same weights, same
tokens, every token has a loss; the two sides take turns after a warm-up, and medians are compared. Weights are not
updated between passes, so the widening of the weights that follows each update is not in the numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.schema import AlgorithmConfig, ModelConfig, PrecisionConfig, RunConfig
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.policy import build_policy
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import DtypeName, MicroBatch

LOSS_SCALE = 2.0**16
Pass = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison, in tokens per second."""

    what: str
    ours: float
    peer: float
    target: float

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    def as_json(self) -> dict[str, str | float]:
        return {"what": self.what, "ours": self.ours, "peer": self.peer, "ratio": self.ratio, "target": self.target}


def our_pass(model: LoadedModel, token_ids_T: Tensor) -> Pass:
    """The trainer's forward and backward pass in FP16."""
    config = RunConfig(precision=PrecisionConfig(preset="fp16"))
    policy = build_policy(config.precision, torch.device("cpu"))
    trainer = PolicyTrainer(model, config=config, policy=policy, algorithm=resolve_algorithm(AlgorithmConfig()))
    micro = one_sequence(token_ids_T)

    def run() -> None:
        (-trainer.score(micro).mean() * LOSS_SCALE).backward()

    return run


def peer_pass(model: LoadedModel, token_ids_T: Tensor, dtype: DtypeName) -> Pass:
    """The plain transformers module and its own loss, in one dtype."""
    module = model.module
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch_dtype(dtype))
    ids = token_ids_T.unsqueeze(0)

    def run() -> None:
        (module(input_ids=ids, labels=ids, use_cache=False).loss * LOSS_SCALE).backward()
        module.zero_grad(set_to_none=True)

    return run


def one_sequence(token_ids_T: Tensor) -> MicroBatch:
    """A pack of one sequence in which every token but the first is a completion token."""
    length = token_ids_T.shape[0]
    return MicroBatch(
        token_ids_T=token_ids_T,
        position_ids_T=torch.arange(length),
        sequence_lengths=(length,),
        loss_rows_C=torch.arange(length - 1),
        target_ids_C=token_ids_T[1:],
        sequence_index_C=torch.zeros(length - 1, dtype=torch.int64),
        behavior_logprobs_C=torch.zeros(length - 1),
        advantages_S=torch.ones(1),
        rollout_index_S=(0,),
    )


def take_turns(ours: Pass, peer: Pass, tokens: int, repeats: int, clock: Clock) -> tuple[float, float]:
    """Median tokens per second of both, measured alternately after one warm-up each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for times, run in zip(seconds, (ours, peer), strict=True):
            start = clock()
            run()
            if turn:
                times.append(clock() - start)
    return tokens / statistics.median(seconds[0]), tokens / statistics.median(seconds[1])


def measure(model: LoadedModel, dtype: DtypeName, tokens: int, target: float, repeats: int, clock: Clock) -> Row:
    """One row: our FP16 pass against the peer in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    token_ids_T = torch.randint(0, model.hf_config.vocab_size, (tokens,), generator=generator)
    peer = peer_pass(copy.deepcopy(model), token_ids_T, dtype)
    ours = our_pass(copy.deepcopy(model), token_ids_T)
    mine, theirs = take_turns(ours, peer, tokens, repeats, clock)
    return Row(what=f"fp16 pass vs torch {dtype}, {tokens} tokens", ours=mine, peer=theirs, target=target)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each side; the median counts")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a pass against FP32")
    parser.add_argument("--fp16-tokens", type=int, default=128, help="tokens of a pass against torch's slow FP16")
    parser.add_argument(
        "--processor-time", action="store_true", help="count processor seconds: for a busy machine, with --threads 1"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON on the last line")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    model = load_model(ModelConfig(name="smollm2"))
    print(f"{'what':<40} {'ours tok/s':>10} {'peer tok/s':>10} {'ratio':>7} {'target':>7}")
    rows = []
    for dtype, tokens, target in (("fp32", args.tokens, 0.75), ("fp16", args.fp16_tokens, 15.0)):
        row = measure(model, dtype, tokens, target, args.repeats, clock)  # type: ignore[arg-type]
        rows.append(row)
        print(f"{row.what:<40} {row.ours:>10.1f} {row.peer:>10.1f} {row.ratio:>7.2f} {row.target:>7.2f}", flush=True)
    if args.json:
        print(json.dumps({"rows": [row.as_json() for row in rows]}))


if __name__ == "__main__":
    main()
