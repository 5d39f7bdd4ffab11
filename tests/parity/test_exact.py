"""`engine.rounding=exact`: behavior and trainer logprobs are equal bit for bit, whatever the batch and the packs."""

from __future__ import annotations

import statistics
from dataclasses import replace
from math import exp
from typing import Any

import pytest
import torch
from tests.tiny_models import SMALL, loaded_model, tiny_config, tiny_module

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.schema import AlgorithmConfig, RunConfig
from betterhalf.models.loading import LoadedModel
from betterhalf.precision.contract import compare
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.training.pack import by_rollout, pack_sequence, pack_step
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
ALGORITHM = resolve_algorithm(AlgorithmConfig(preset="reinforce"))
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
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    return trainer, engine


def sampled(engine: RolloutEngine, config: RunConfig, siblings: int) -> list[Rollout]:
    requests = [
        GenerateRequest(token_ids=ids, group_size=siblings, key=(0, 1, k), with_support=True)
        for k, ids in enumerate(PROMPTS)
    ]
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


TRUNCATIONS = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "all three": {"top_p": 0.95, "top_k": 20, "min_p": 0.01},
}


@pytest.mark.parametrize(
    ("truncation", "precision"),
    [
        *(("top_p", precision) for precision in ("fp32", "fp16", "bf16")),
        *((truncation, "fp16") for truncation in ("top_k", "min_p", "all three")),
    ],
)
def test_a_truncated_distribution_is_scored_with_the_same_bits(truncation: str, precision: str) -> None:
    config = config_of(precision, sampling={"max_tokens": 30, "temperature": 0.8, **TRUNCATIONS[truncation]})
    trainer, engine = sides(model_of("qwen3 with head norms"), config)
    rollouts = sampled(engine, config, 4)
    supports = [rollout.completion.support for rollout in rollouts]
    counts = [count for support in supports if support is not None for count in support.counts]
    assert len(counts) == sum(map(len, behavior(rollouts))) and 1 < statistics.fmean(counts) < 25
    assert measured(trainer, rollouts, config) == behavior(rollouts)
    # The whole distribution gives other logprobs: smaller ones, by the mass that was removed.
    whole = [replace(rollout, completion=replace(rollout.completion, support=None)) for rollout in rollouts]
    for ours, theirs, support in zip(measured(trainer, whole, config), behavior(rollouts), supports, strict=True):
        assert support is not None
        gaps = [exp(a - b) for a, b in zip(ours, theirs, strict=True)]
        assert gaps == pytest.approx(support.masses, abs=1e-5) and min(gaps) < 0.95


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_the_batch_nor_the_packs_matter(threads: int) -> None:
    before, few_tokens = torch.get_num_threads(), {"max_tokens": 20 if threads == 1 else 3}
    torch.set_num_threads(threads)
    try:
        config, model = config_of("fp16", sampling=few_tokens), model_of("qwen3 with head norms")
        trainer, engine = sides(model, config)
        rollouts = sampled(engine, config, 17)
        wanted = behavior(rollouts)
        for most, siblings in ((1, 1), (3, 3)):
            slots = config_of("fp16", sampling=few_tokens, engine={"rounding": "exact", "max_concurrent": most})
            few = build_engine(slots, model.hf_config, model.stop_token_ids, trainer.precision)
            few.load_weights(trainer.weight_stream(), policy_version=0)
            by_prompt = [wanted[start : start + siblings] for start in range(0, len(wanted), 17)]
            assert behavior(sampled(few, slots, siblings)) == [row for rows in by_prompt for row in rows]
        for budget in (1, 90, 100_000):
            packed = config_of("fp16", training={"tokens_per_micro_batch": budget, "optimizer_steps": 1})
            assert measured(trainer, rollouts[::4], packed) == wanted[::4]
        for rollout, values in zip(rollouts[::25], wanted[::25], strict=True):
            assert measured(trainer, [rollout], config) == [values]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_scores_of_the_engine_are_the_trainers(precision: str) -> None:
    config = config_of(precision, sampling={"max_tokens": 30})
    trainer, engine = sides(model_of("llama"), config)
    for token_ids in PROMPTS[1:]:
        (scores,) = trainer.measure([pack_sequence(token_ids)])
        assert engine.score([token_ids]) == [tuple(scores.logprobs_C.tolist())]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_sides_stay_equal_through_training(precision: str) -> None:
    config = config_of(precision, optimizer={"learning_rate": 0.01})
    trainer, engine = sides(model_of("qwen2 with biases"), config)
    seen = []
    for step in range(3):
        rollouts = sampled(engine, config, 3)
        assert measured(trainer, rollouts, config) == behavior(rollouts)
        seen.append(behavior(rollouts))
        advantages = [1.0 if index % 3 else -1.0 for index in range(len(rollouts))]
        batch = pack_step(rollouts, advantages, config, step=step)
        trainer.forward_backward(batch.packs, ALGORITHM, batch.train_batches[0].denominators)
        assert not trainer.optim_step(0.01).skipped
        engine.load_weights(trainer.weight_stream(), policy_version=step + 1)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_gradients_are_those_of_the_usual_layers(precision: str) -> None:
    found = []
    for rounding in ("exact", "aligned"):
        config = config_of(precision, engine={"rounding": rounding})
        if rounding == "aligned" and precision == "bf16":
            config = config.model_copy(
                update={"precision": config.precision.model_copy(update={"half_matmul": "fp32_sums"})}
            )
        trainer, engine = sides(model_of("mistral with a window"), config)
        if not found:
            rollouts = sampled(engine, config, 3)
        batch = pack_step(rollouts, [1.0] * len(rollouts), config, step=0)
        trainer.forward_backward(batch.packs, ALGORITHM, batch.train_batches[0].denominators)
        gradients = torch.cat([gradient.flatten().double() for _, gradient in trainer.weights.gradients()])
        found.append(gradients / trainer.scaler.scale)
    ours, theirs = found
    bound = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[precision]
    difference = float((ours - theirs).norm() / theirs.norm())
    assert 0 < difference < bound


@pytest.mark.parametrize("precision", ["fp16", "e8m2"])
@pytest.mark.parametrize("island", ["model.layers.1.mlp.down_proj", "model.layers.*.self_attn", "model.layers.*"])
def test_fp32_islands_are_equal_too(island: str, precision: str) -> None:
    config = RunConfig.model_validate(
        config_of(precision).model_dump() | {"precision": {"preset": precision, "fp32_modules": [island]}}
    )
    # Wide enough that usual products of an island's FP32 operands would add in another order.
    wide = tiny_config("qwen3", SMALL, hidden_size=96, intermediate_size=272, head_dim=32)
    trainer, engine = sides(loaded_model(tiny_module(wide, seed=4, norms=0.3), stop_token_ids=(1,)), config)
    rollouts = sampled(engine, config, 4)
    assert measured(trainer, rollouts, config) == behavior(rollouts)


def test_both_sides_report_exact_rounding() -> None:
    trainer, engine = sides(model_of("llama"), config_of("bf16"))
    contract = compare(trainer.report(), engine.report(), allow_difference=False)
    rows = {row.region: (row.trainer, row.engine) for row in contract.rows}
    assert contract.ok
    assert rows["rounding"] == ("exact", "exact")
    assert rows["matmul_sums"] == ("fp32", "fp32")
    assert rows["linear_layers"] == ("21 widened to fp32",) * 2
    assert rows["attention"] == ("betterhalf_packed_exact", "tiles in FP32, as the trainer's")


def test_aligned_rounding_is_not_exact() -> None:
    # a processor's library may happen to add one format's products in the same order on both sides
    differs = []
    for precision in ("fp32", "fp16", "bf16"):
        config = config_of(precision, engine={"rounding": "aligned"})
        trainer, engine = sides(model_of("llama"), config)
        rollouts = sampled(engine, config, 4)
        differs.append(measured(trainer, rollouts, config) != behavior(rollouts))
    assert any(differs)
