"""`engine.rounding=exact`: behavior and trainer logprobs are equal bit for bit, whatever the batch and the packs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import SMALL, loaded_model, tiny_config, tiny_module

from betterhalf.config.schema import RunConfig
from betterhalf.models.loading import LoadedModel
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import GenerateRequest, Prompt, Rollout

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one key head for each query head": ("llama", {"num_key_value_heads": 4}),
    "mistral with a window": ("mistral", {"sliding_window": 7}),
    "qwen2 with biases": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 with head norms": ("qwen3", {}),
    "odd sizes": ("llama", {"hidden_size": 36, "intermediate_size": 50, "vocab_size": 61, "head_dim": 6}),
}
PROMPTS = [tuple((7 * k + 3 * i) % 55 + 2 for i in range(length)) for k, length in enumerate((1, 3, 3, 8, 21, 70))]


def model_of(name: str) -> LoadedModel:
    family, changes = MODELS[name]
    module = tiny_module(tiny_config(family, SMALL, **changes), seed=4, biases=0.3, norms=0.3)
    return loaded_model(module, stop_token_ids=(1,))


def config_of(precision: str, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": {"preset": precision},
            "engine": {"rounding": "exact"},
            "sampling": {"max_tokens": 30, "temperature": 0.8},
            "training": {"tokens_per_micro_batch": 300, "optimizer_steps": 1},
        }
        | changes
    )


def sides(model: LoadedModel, config: RunConfig) -> tuple[PolicyTrainer, RolloutEngine]:
    roles = build_precision(config.precision, torch.device("cpu"), exact=config.exact)
    engine = build_engine(config, model.hf_config, model.stop_token_ids, roles)
    trainer = PolicyTrainer(model, config=config, precision=roles)
    engine.load_weights(trainer.wire_weights().tensors, policy_version=0)
    return trainer, engine


def sampled(engine: RolloutEngine, config: RunConfig, siblings: int) -> list[Rollout]:
    requests = [GenerateRequest(token_ids=ids, group_size=siblings, key=(0, 1, k)) for k, ids in enumerate(PROMPTS)]
    return [
        Rollout(
            prompt=Prompt(prompt_id="", text="", token_ids=request.token_ids, answer=""),
            completion=completion,
            text="",
            reward=0.0,
        )
        for request, group in zip(requests, engine.generate(requests, config.sampling), strict=True)
        for completion in group
    ]


def behavior(rollouts: list[Rollout]) -> list[list[float]]:
    return [list(rollout.completion.behavior_logprobs) for rollout in rollouts]


def measured(trainer: PolicyTrainer, rollouts: list[Rollout], config: RunConfig) -> list[list[float]]:
    packs = pack_step(rollouts, [1.0] * len(rollouts), config, step=1).packs
    scores: dict[int, list[float]] = {}
    for pack in packs:
        scores |= by_rollout(pack, trainer.measure([pack])[0].logprobs_C)
    return [scores[index] for index in range(len(rollouts))]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "e8m3", "e8m2"])
@pytest.mark.parametrize("name", MODELS)
def test_both_sides_give_the_same_bits(name: str, precision: str) -> None:
    config = config_of(precision)
    trainer, engine = sides(model_of(name), config)
    rollouts = sampled(engine, config, 4)
    assert measured(trainer, rollouts, config) == behavior(rollouts)
