"""Measure what sharing a prompt among siblings adds to the rounding error of a half gradient.

    python benchmarks/shared_prompts.py [--siblings 8 64]

A pack holds a prompt once for all its siblings, so the gradients of its keys, values and last row are added over the
siblings before they go on through the prompt; without sharing, each sibling has a pack of its own, and only gradients
of weights are added, in FP32. Both are compared with the FP32 trainer's gradient of REINFORCE on the same completions:
random tokens of two prompts, at the weights of `demo-small`, on a CPU.
"""

from __future__ import annotations

import argparse
import random

import torch

from betterhalf.algorithms.presets import PRESETS
from betterhalf.config.schema import ModelConfig, RunConfig
from betterhalf.models.loading import load_model
from betterhalf.precision.roles import build_precision
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, DtypeName, Prompt, Rollout

PROMPTS, PROMPT_TOKENS, COMPLETION_TOKENS, VOCABULARY = 2, 24, 16, 16
ALONE, TOGETHER = PROMPT_TOKENS + COMPLETION_TOKENS, 10**6
"""Tokens of a pack that holds one sequence, and of one that holds all."""


def random_rollouts(siblings: int, draw: random.Random) -> list[Rollout]:
    """Return `siblings` completions of each prompt, all of one length."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, VOCABULARY) for _ in range(count))

    prompts = [Prompt(prompt_id=str(k), text="", token_ids=tokens(PROMPT_TOKENS), answer="") for k in range(PROMPTS)]
    return [
        Rollout(
            prompt=prompt,
            completion=Completion(
                token_ids=tokens(COMPLETION_TOKENS),
                behavior_logprobs=(-2.0,) * COMPLETION_TOKENS,
                finish_reason="stop",
                policy_version=0,
            ),
            text="",
            reward=0.0,
        )
        for prompt in prompts
        for _ in range(siblings)
    ]


def gradient(dtype: DtypeName, pack_tokens: int, siblings: int) -> tuple[int, torch.Tensor]:
    """Return the number of packs, and the gradient of all weights in one vector, in float64."""
    training = {"optimizer_steps": 1, "tokens_per_micro_batch": pack_tokens}
    config = RunConfig.model_validate({"precision": {"preset": dtype}, "training": training})
    precision = build_precision(config.precision, torch.device("cpu"))
    trainer = PolicyTrainer(load_model(ModelConfig(name="demo-small")), config=config, precision=precision)
    draw = random.Random(0)
    rollouts = random_rollouts(siblings, draw)
    batch = pack_step(rollouts, [draw.gauss(0.0, 1.0) for _ in rollouts], config, step=1)
    trainer.forward_backward(batch.packs, PRESETS["reinforce"], batch.train_batches[0].denominators)
    found = dict(trainer.weights.gradients())
    vector = torch.cat([found[name].double().flatten() for name in sorted(found)])
    return len(batch.packs), vector / trainer.scaler.scale


def main() -> None:
    """Print relative errors of the gradient, in the Euclidean norm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--siblings", type=int, nargs="+", default=[8, 64])
    arguments = parser.parse_args()
    print("format  siblings  alone (packs)    shared (packs)   ratio")
    for siblings in arguments.siblings:
        _, reference = gradient("fp32", ALONE, siblings)
        for dtype in ("fp16", "bf16"):
            found = [gradient(dtype, tokens, siblings) for tokens in (ALONE, TOGETHER)]
            errors = [float((vector - reference).norm() / reference.norm()) for _, vector in found]
            columns = "   ".join(f"{error:.2e} ({packs})" for error, (packs, _) in zip(errors, found, strict=True))
            print(f"{dtype:6}  {siblings:8}  {columns}  {errors[1] / errors[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
