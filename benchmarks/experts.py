#!/usr/bin/env python
"""Measure the mismatch of a mixture of experts: router in half against FP32, with and without routing replay.

    .venv/bin/python benchmarks/experts.py FOLDER [--prompts 32] [--precisions fp16 bf16]

FOLDER holds a Qwen3-MoE that knows the task, as `scripts/make_demo_model.py --model demo-moe FOLDER` writes. The native
engine samples four completions of each prompt, and the trainer scores them at the same weights. `router in half` rounds
router logits to the model's format on both sides, as transformers and vLLM do. It prints a row of Markdown for each
format and router: k3 without and with replay, and the shares of tokens whose experts differ (mean over layers, and in
any layer).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from betterhalf.config.schema import ArithmeticTask, ModelConfig, RunConfig
from betterhalf.diagnostics.experts import change_metrics, changed_tokens, joined
from betterhalf.diagnostics.logprob_gap import mismatch_metrics
from betterhalf.models.loading import load_model
from betterhalf.precision import experts, routing
from betterhalf.precision.emulation import to_format
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.native import mixture
from betterhalf.tasks.build import build_task
from betterhalf.training.pack import pack_measured
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import DtypeName, GenerateRequest, Rollout


@contextmanager
def rounded_router(name: DtypeName) -> Iterator[None]:
    """Return a context in which both sides round router logits to a format."""

    def chosen(logits_TE: Tensor, count: int) -> Tensor:
        return routing.chosen_experts(to_format(logits_TE, name).float(), count)

    def weights(logits_TE: Tensor, experts_TK: Tensor, *, normalise: bool) -> Tensor:
        return routing.expert_weights(to_format(logits_TE, name).float(), experts_TK, normalise=normalise)

    with (
        patch.object(experts, "chosen_experts", chosen),
        patch.object(experts, "expert_weights", weights),
        patch.object(mixture, "chosen_experts", chosen),
        patch.object(mixture, "expert_weights", weights),
    ):
        yield


def measure(folder: str, name: DtypeName, prompts: int, *, replays: bool) -> dict[str, float]:
    """Return the mismatch metrics, and those of the experts, of one format."""
    config = RunConfig.model_validate(
        {
            "precision": {"preset": name},
            "algorithm": {"routing_replay": replays},
            "sampling": {"max_tokens": 20},
            "training": {"tokens_per_micro_batch": 2048},
        }
    )
    model = load_model(ModelConfig(name=folder))
    precision = build_precision(config.precision, torch.device("cpu"))
    engine = build_engine(config, model.hf_config, model.stop_token_ids, precision)
    trainer = PolicyTrainer(model, config=config, precision=precision)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    task = build_task(ArithmeticTask(terms=5), model.tokenizer)
    asked = [task.prompt(index) for index in range(prompts)]
    requests = [
        GenerateRequest(token_ids=prompt.token_ids, group_size=4, key=(0, 1, index), with_experts=True)
        for index, prompt in enumerate(asked)
    ]
    rollouts = [
        Rollout(prompt=prompt, completion=completion, text="", reward=0.0)
        for prompt, group in zip(asked, engine.generate(requests, config.sampling), strict=True)
        for completion in group
    ]
    packs = pack_measured(rollouts, config)
    scores = trainer.measure(packs)
    offsets = [sum(pack.num_sequences for pack in packs[:index]) for index in range(len(packs))]
    own, given = [s.experts_TLK for s in scores], [p.experts_TLK for p in packs]
    return mismatch_metrics(
        torch.cat([score.logprobs_C for score in scores]),
        torch.cat([pack.behavior_logprobs_C for pack in packs]),
        torch.cat([pack.sequence_index_C + offset for pack, offset in zip(packs, offsets, strict=True)]),
        len(rollouts),
    ) | change_metrics(
        changed_tokens(joined([x for x in own if x is not None]), joined([x for x in given if x is not None]))
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16"])
    arguments = parser.parse_args()
    print("| format | router | k3 | k3 with replay | other experts, mean of layers | in any layer | tokens |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.precisions:
        for router in ("fp32", name) if name != "fp32" else ("fp32",):
            with rounded_router(router):
                plain, replayed = (
                    measure(arguments.folder, name, arguments.prompts, replays=replays) for replays in (False, True)
                )
            shares = (plain[f"experts/change_fraction/{which}"] for which in ("mean", "any_layer"))
            numbers = " | ".join(f"{share:.2%}" for share in shares)
            k3 = "mismatch/k3/mean"
            row = f"| {name} | {router} | {plain[k3]:.2e} | {replayed[k3]:.2e} | {numbers}"
            print(f"{row} | {plain['mismatch/tokens']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
