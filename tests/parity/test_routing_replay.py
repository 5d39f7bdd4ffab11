"""Routing replay: the engine's experts reach the trainer token by token, and the mismatch falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import EXPERTS, SMALL, loaded_model, tiny_config, tiny_module

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.batches import MicroBatch
from betterhalf.config.schema import AlgorithmConfig, RunConfig
from betterhalf.diagnostics.experts import change_metrics, changed_tokens
from betterhalf.diagnostics.logprob_gap import mismatch_metrics
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, GenerateRequest, Prompt, Rollout

PROMPTS = [tuple((7 * k + 3 * i) % 95 + 2 for i in range(3 + 4 * k)) for k in range(4)]
ALGORITHM = resolve_algorithm(AlgorithmConfig(preset="reinforce"))


def config_of(precision: str, *, replays: bool, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": {"preset": precision},
            "algorithm": {"preset": "reinforce", "routing_replay": replays},
            "sampling": {"max_tokens": 24},
            "training": {"tokens_per_micro_batch": 200, "optimizer_steps": 1, **training},
        }
    )


def sides(config: RunConfig) -> tuple[PolicyTrainer, list[Rollout]]:
    """Return the trainer, and rollouts that the native engine sampled with the same weights."""
    model = loaded_model(tiny_module(tiny_config("qwen3_moe", SMALL, **EXPERTS), seed=4), stop_token_ids=(1,))
    roles = build_precision(config.precision, torch.device("cpu"))
    engine = build_engine(config, model.hf_config, model.stop_token_ids, roles)
    trainer = PolicyTrainer(model, config=config, precision=roles)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    requests = [
        GenerateRequest(token_ids=ids, group_size=3, key=(0, 1, k), with_experts=True) for k, ids in enumerate(PROMPTS)
    ]
    prompts = [Prompt(prompt_id="", text="", token_ids=request.token_ids, answer="") for request in requests]
    groups = engine.generate(requests, config.sampling)
    return trainer, [
        Rollout(prompt=prompt, completion=completion, text="", reward=0.0)
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]


def packed(rollouts: list[Rollout], config: RunConfig) -> tuple[MicroBatch, ...]:
    return pack_step(rollouts, [1.0, -1.0, 0.5] * len(PROMPTS), config, step=1).packs


def gap(trainer: PolicyTrainer, packs: tuple[MicroBatch, ...]) -> dict[str, float]:
    offsets = [sum(pack.num_sequences for pack in packs[:k]) for k in range(len(packs))]
    return mismatch_metrics(
        torch.cat([score.logprobs_C for score in trainer.measure(packs)]),
        torch.cat([pack.behavior_logprobs_C for pack in packs]),
        torch.cat([pack.sequence_index_C + offset for pack, offset in zip(packs, offsets, strict=True)]),
        sum(pack.num_sequences for pack in packs),
    )


def experts_of(completion: Completion) -> torch.Tensor:
    assert completion.experts is not None
    return completion.experts.experts_NLK


def test_the_engine_reports_the_experts_of_every_token_it_read() -> None:
    _, rollouts = sides(config_of("fp32", replays=False))
    for rollout in rollouts:
        count = len(rollout.prompt.token_ids) + len(rollout.completion.token_ids) - 1
        found = experts_of(rollout.completion)
        assert found.shape == (count, 3, 2) and found.dtype == torch.uint8 and int(found.max()) < 8
    first, second = (experts_of(rollout.completion)[: len(PROMPTS[0])] for rollout in rollouts[:2])
    assert torch.equal(first, second)


def test_in_fp32_both_sides_choose_the_same_experts_token_by_token() -> None:
    config = config_of("fp32", replays=False)
    trainer, rollouts = sides(config)
    packs = packed(rollouts, config)
    assert len(packs) > 1
    for pack, score in zip(packs, trainer.measure(packs), strict=True):
        assert pack.experts_TLK is not None and pack.experts_TLK.shape == (pack.num_tokens, 3, 2)
        assert score.experts_TLK is not None and score.num_experts == 8
        assert (
            change_metrics(changed_tokens(score.experts_TLK, pack.experts_TLK))["experts/change_fraction/any_layer"]
            == 0.0
        )


@pytest.mark.parametrize("precision", ["bf16", "e8m4"])
def test_replay_lowers_the_mismatch_and_reports_the_choice_not_taken(precision: str) -> None:
    results = {}
    for replays in (False, True):
        config = config_of(precision, replays=replays)
        trainer, rollouts = sides(config)
        packs = packed(rollouts, config)
        changed = [
            change_metrics(changed_tokens(score.experts_TLK, pack.experts_TLK))["experts/change_fraction/any_layer"]  # type: ignore[arg-type]
            for pack, score in zip(packs, trainer.measure(packs), strict=True)
        ]
        results[replays] = gap(trainer, packs)["mismatch/k3/mean"], max(changed)
    assert results[True][0] < 0.7 * results[False][0]
    assert min(results[True][1], results[False][1]) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_passes_measure_what_they_train_and_reach_the_router(checkpointing: bool) -> None:
    config = config_of("bf16", replays=True, activation_checkpointing=checkpointing)
    trainer, rollouts = sides(config)
    batch = pack_step(rollouts, [1.0, -1.0, 0.5] * len(PROMPTS), config, step=1)
    for pack in batch.packs:
        assert torch.equal(trainer.measure([pack])[0].logprobs_C, trainer.score(pack).detach())
    trainer.forward_backward(batch.packs, ALGORITHM, batch.train_batches[0].denominators)
    gradients = {name: gradient for name, gradient in trainer.weights.gradients() if name.endswith("gate.weight")}
    assert all(bool((gradient.abs().sum(1) > 0).all()) for gradient in gradients.values())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_replay_without_recorded_experts_computes_the_trainers_own() -> None:
    config = config_of("fp32", replays=True)
    trainer, rollouts = sides(config)
    from dataclasses import replace

    bare = [replace(r, completion=replace(r.completion, experts=None)) for r in rollouts]
    for with_experts, without in zip(packed(rollouts, config), packed(bare, config), strict=True):
        assert without.experts_TLK is None
        torch.testing.assert_close(
            trainer.measure([without])[0].logprobs_C, trainer.measure([with_experts])[0].logprobs_C
        )
