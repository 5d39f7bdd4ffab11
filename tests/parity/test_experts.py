"""Mixtures of experts: trainer and plain transformers, and what training changes; see also tests/unit/precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ranks import run_ranks
from tests.tiny_models import EXPERTS, SMALL, loaded_model, skeleton_model, tiny_config, tiny_module
from transformers import AutoModelForCausalLM

from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import StepBatch
from betterhalf.config.schema import RunConfig
from betterhalf.distributed.group import GroupCollective
from betterhalf.errors import InputError
from betterhalf.precision.roles import build_precision
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.training.weights.replicated import ReplicatedWeights
from betterhalf.training.weights.sharded import sharded_over
from betterhalf.types import Completion, Prompt, Rollout

ADVANTAGES = (1.0, -1.0, 0.5, -0.5)
FAMILIES = {"qwen3_moe": {"norm_topk_prob": True}, "qwen2_moe": {"shared_expert_intermediate_size": 48}, "olmoe": {}}


def config_of(family: str = "qwen3_moe") -> Any:
    sizes = {**SMALL, **EXPERTS, **FAMILIES[family]}
    if family == "olmoe":
        sizes |= {"intermediate_size": 32}
    return tiny_config(family, sizes, attn_implementation="eager")


def settings(preset: str, *, islands: tuple[str, ...] = (), **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": {"preset": preset, "fp32_modules": islands},
            "sampling": {"max_tokens": 16},
            "training": {"optimizer_steps": 1, **changes},
            "optimizer": {"learning_rate": 1e-3},
        }
    )


def rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 97, (length,), generator=generator).tolist())

    prompt = Prompt(prompt_id="0", text="", token_ids=ids(9), answer="")
    return [
        Rollout(
            prompt=prompt,
            completion=Completion(
                token_ids=(tokens := ids(10 + k)),
                behavior_logprobs=(-4.5,) * len(tokens),
                finish_reason="stop",
                policy_version=0,
            ),
            text="",
            reward=0.0,
        )
        for k in range(len(ADVANTAGES))
    ]


def trainer_of(config: RunConfig, family: str = "qwen3_moe", store: Any = ReplicatedWeights, **more: Any) -> Any:
    model = loaded_model(tiny_module(config_of(family), seed=5))
    precision = build_precision(config.precision, torch.device("cpu"))
    return PolicyTrainer(model, config=config, precision=precision, store=store, **more)


def packed(config: RunConfig) -> StepBatch:
    return pack_step(rollouts(), ADVANTAGES, config, step=1)


def step(trainer: Any, config: RunConfig) -> dict[str, torch.Tensor]:
    """Take one optimizer step, and return the gradients before it."""
    batch = packed(config)
    trainer.forward_backward(batch.packs, PRESETS["reinforce"], batch.train_batches[0].denominators)
    gradients = {name: gradient.clone() / trainer.scaler.scale for name, gradient in trainer.weights.gradients()}
    assert not trainer.optim_step(1e-3).skipped
    return gradients


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_fp32_trainer_agrees_with_plain_transformers(family: str) -> None:
    config, gaps = settings("fp32"), []
    trainer, plain = trainer_of(config, family), tiny_module(config_of(family), seed=5)
    for pack in packed(config).packs:
        expected = []
        for index in pack.rollout_index_S:
            prompt, completion = rollouts()[index].prompt.token_ids, rollouts()[index].completion.token_ids
            logits = plain(torch.tensor([(*prompt, *completion)])).logits[0, len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1))
        gaps.append(trainer.measure([pack])[0].logprobs_C.double() - torch.cat(expected).detach().double())
    gap = torch.cat(gaps)
    assert float((gap.exp() - 1 - gap).mean()) < 1e-9


def test_half_gradients_follow_those_of_fp32_and_reach_router_and_experts() -> None:
    wide, half = (step(trainer_of(config), config) for config in (settings("fp32"), settings("fp16")))
    for name, gradient in half.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), wide[name].flatten(), 0) > 0.999, name
    assert wide["model.layers.1.mlp.gate.weight"].norm() > 1e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "e8m4"])
def test_measured_logprobs_are_those_of_training_bit_for_bit(precision: str) -> None:
    config = settings(precision)
    trainer = trainer_of(config)
    for pack in packed(config).packs:
        assert torch.equal(trainer.measure([pack])[0].logprobs_C, trainer.score(pack).detach())


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, checkpointed = settings("fp16"), settings("fp16", activation_checkpointing=True)
    expected, found = step(trainer_of(plain), plain), step(trainer_of(checkpointed), checkpointed)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name


def test_a_block_of_experts_is_an_fp32_island_as_a_whole() -> None:
    config = settings("fp16", islands=("model.layers.1.mlp",))
    trainer = trainer_of(config)
    assert trainer.weights.computing_dtype("model.layers.1.mlp.experts.down_proj") == torch.float32
    step(trainer, config)
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.down_proj' cannot be an FP32 island"):
        trainer_of(settings("fp16", islands=("model.layers.1.mlp.down_proj",)))


def test_the_wire_has_the_names_and_values_of_the_files(tmp_path: Any) -> None:
    trainer = trainer_of(settings("fp32"))
    trainer.module.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    files, wire = load_file(tmp_path / "model.safetensors"), dict(trainer.weight_stream())
    assert files.keys() == wire.keys() and "model.layers.2.mlp.experts.7.up_proj.weight" in wire
    for name, tensor in files.items():
        assert torch.equal(wire[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, one), two in zip(again.named_parameters(), trainer.module.parameters(), strict=True):
        assert torch.equal(one, two), name


def sharded_step(ranks: GroupCollective, precision: str) -> dict[str, torch.Tensor]:
    """Take the step on this rank, which has every second pack, and return the weights on the wire."""
    config = settings(precision, tokens_per_micro_batch=40)
    model = skeleton_model(loaded_model(tiny_module(config_of("qwen3_moe"), seed=5)))
    precision_of_run = build_precision(config.precision, torch.device("cpu"))
    store = sharded_over(ranks, model.weights)
    trainer = PolicyTrainer(model, config=config, precision=precision_of_run, store=store, collective=ranks)
    batch = packed(config)
    mine = batch.packs[ranks.rank :: ranks.world_size]
    trainer.forward_backward(mine, PRESETS["reinforce"], batch.train_batches[0].denominators)
    assert not trainer.optim_step(1e-3).skipped
    return {name: tensor.float() for name, tensor in trainer.weight_stream()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_ranks_take_the_step_of_one(precision: str) -> None:
    config = settings(precision, tokens_per_micro_batch=40)
    assert len(packed(config).packs) == 2
    alone = trainer_of(config)
    step(alone, config)
    expected = dict(alone.weight_stream())
    first, second = run_ranks(sharded_step, 2, precision)
    assert first.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor.float(), rtol=1e-3, atol=1e-4, msg=name)
