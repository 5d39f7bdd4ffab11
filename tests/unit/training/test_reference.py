"""The reference policy scores with the trainer's own code, leaves the trainer's weights alone, and is restored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_models
from tests.written_checkpoints import load, save

from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import Denominators, MicroBatch
from betterhalf.config.schema import KlConfig, RunConfig
from betterhalf.errors import CheckpointError
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.roles import build_precision
from betterhalf.training import checkpoint
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.training.trainer import TrainerState
from betterhalf.types import Completion, Prompt, Rollout

ALGORITHM = PRESETS["reinforce"]
OF = Denominators(sequences=4.0, tokens=40.0, max_tokens=16)


def config_of(precision: dict[str, Any], **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": precision,
            "sampling": {"max_tokens": 16, "temperature": 0.8},
            "training": {"optimizer_steps": 1, "tokens_per_micro_batch": 30},
            "optimizer": {"learning_rate": 1e-2},
            **changes,
        }
    )


def trainer_for(config: RunConfig, *, tied: bool = True, keep_reference: bool = True, seed: int = 0) -> PolicyTrainer:
    model = tiny_models.tiny_model("llama", seed=seed, tie_word_embeddings=tied)
    precision = build_precision(config.precision, torch.device("cpu"), exact=config.exact)
    return PolicyTrainer(model, config=config, precision=precision, keep_reference=keep_reference)


def packs(config: RunConfig) -> tuple[MicroBatch, ...]:
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 31, (length,), generator=draw).tolist())

    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id=str(k), text="", token_ids=ids(4), answer=""),
            completion=Completion(
                token_ids=ids(6 + k), behavior_logprobs=(-3.0,) * (6 + k), finish_reason="stop", policy_version=0
            ),
            text="",
            reward=0.0,
        )
        for k in range(4)
    ]
    return pack_step(rollouts, [1.0, -1.0, 0.5, -0.5], config, 1).packs


def update(trainer: PolicyTrainer, times: int = 1) -> None:
    for _ in range(times):
        trainer.forward_backward(packs(trainer.config), ALGORITHM, OF)
        assert not trainer.optim_step(1e-2).skipped


def logprobs(trainer: PolicyTrainer, which: str) -> torch.Tensor:
    score = {"policy": trainer.measure, "reference": trainer.measure_reference, "kept": trainer.measure_kept}[which]
    return torch.cat([scores.logprobs_C for scores in score(packs(trainer.config))])


PRECISIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp16": ({"preset": "fp16"}, {}),
    "bf16": ({"preset": "bf16"}, {}),
    "fp32": ({"preset": "fp32"}, {}),
    "emulated": ({"preset": "e8m4"}, {}),
    "islands": ({"preset": "fp16", "fp32_modules": ["model.layers.0.mlp"]}, {}),
    "exact": ({"preset": "fp16"}, {"engine": {"rounding": "exact"}}),
    "checkpointing": ({"preset": "fp16"}, {"training": {"optimizer_steps": 1, "activation_checkpointing": True}}),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_reference_is_the_starting_policy_bit_for_bit(name: str, tied: bool) -> None:
    precision, changes = PRECISIONS[name]
    trainer = trainer_for(config_of(precision, **changes), tied=tied)
    start = logprobs(trainer, "policy")
    assert torch.equal(logprobs(trainer, "reference"), start)
    update(trainer)
    moved = logprobs(trainer, "policy")
    assert not torch.equal(moved, start)
    assert torch.equal(logprobs(trainer, "reference"), start)
    assert torch.equal(logprobs(trainer, "policy"), moved)


@pytest.mark.parametrize("name", ["fp16", "fp32", "islands"])
def test_scoring_the_reference_changes_nothing_in_the_training(name: str) -> None:
    config = config_of(PRECISIONS[name][0])
    disturbed, plain = trainer_for(config), trainer_for(config, keep_reference=False)
    for _ in range(3):
        disturbed.forward_backward(packs(config), ALGORITHM, OF)
        disturbed.measure_reference(packs(config))
        disturbed.optim_step(1e-2)
        update(plain)
    assert weights_digests(disturbed.weights.computing()) == weights_digests(plain.weights.computing())
    assert weights_digests(disturbed.weight_stream()) == weights_digests(plain.weight_stream())


def test_the_weights_come_back_when_scoring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(config_of({"preset": "fp16"}))
    update(trainer)
    before = weights_digests(trainer.weights.computing())

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of memory"):
        patched.setattr(trainer, "_measure", fail)
        trainer.measure_reference(packs(trainer.config))
    assert weights_digests(trainer.weights.computing()) == before


def test_the_reference_is_one_more_copy_in_the_compute_dtype() -> None:
    trainer = trainer_for(config_of({"preset": "fp16", "fp32_modules": ["model.layers.0.mlp"]}))
    update(trainer)
    trainer.refresh_reference()
    held = trainer.state().reference
    assert held.keys() == trainer.state().model.keys()
    assert {tensor.dtype for tensor in held.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["fp16", "fp32"])
def test_a_refresh_makes_the_current_policy_the_reference(name: str) -> None:
    trainer = trainer_for(config_of(PRECISIONS[name][0]))
    update(trainer)
    trainer.refresh_reference()
    refreshed = logprobs(trainer, "policy")
    assert torch.equal(logprobs(trainer, "reference"), refreshed)
    update(trainer)
    assert torch.equal(logprobs(trainer, "reference"), refreshed)


# -- state


def saved(trainer: PolicyTrainer, folder: Path) -> TrainerState:
    return load(save(folder, 1, trainer.state(), keep=1))


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "emulated"])
def test_a_checkpoint_restores_the_reference_bit_for_bit(name: str, refreshed: bool, tmp_path: Path) -> None:
    config = config_of(PRECISIONS[name][0])
    trainer, resumed = trainer_for(config), trainer_for(config)
    update(trainer)
    if refreshed:
        trainer.refresh_reference()
        update(trainer)
    back = saved(trainer, tmp_path)
    assert (tmp_path / "step-000001" / "reference.safetensors").exists() is refreshed
    resumed.load(back)
    for which in ("policy", "reference"):
        assert torch.equal(logprobs(resumed, which), logprobs(trainer, which))
    assert saved(resumed, tmp_path / "again").reference_digest == back.reference_digest


def test_a_starting_policy_that_has_changed_is_refused(tmp_path: Path) -> None:
    config = config_of({"preset": "fp16"})
    trainer, other = trainer_for(config), trainer_for(config, seed=1)
    update(trainer)
    with pytest.raises(CheckpointError, match="reference policy of checkpoint .* is not the model that this run loads"):
        other.load(saved(trainer, tmp_path))


def test_damage_to_the_reference_is_found(tmp_path: Path) -> None:
    trainer = trainer_for(config_of({"preset": "fp16"}))
    trainer.refresh_reference()
    saved(trainer, tmp_path)
    path = tmp_path / "step-000001" / "reference.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"corrupted \(reference.safetensors has another checksum"):
        checkpoint.load(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match="reference.safetensors: No such file"):
        checkpoint.load(path.parent)


# -- the loss in the trainer


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_penalty_has_no_gradient_at_the_reference_and_pulls_back_away_from_it(estimator: str) -> None:
    config = config_of({"preset": "fp32"})
    trainer = trainer_for(config)
    kl = KlConfig.model_validate({"coefficient": 1.0, "estimator": estimator})
    algorithm = replace(ALGORITHM, kl=kl)

    def batch() -> list[MicroBatch]:
        scores = trainer.measure_reference(packs(config))
        return [
            replace(pack, reference_logprobs_C=one.logprobs_C, advantages_S=torch.zeros_like(pack.advantages_S))
            for pack, one in zip(packs(config), scores, strict=True)
        ]

    stats = trainer.forward_backward(batch(), algorithm, OF)
    assert float(stats.kl_loss) == 0.0
    assert all(not gradient.any() for _, gradient in trainer.weights.gradients())
    trainer.weights.zero_grad()
    update(trainer, 2)
    distances = []
    for _ in range(6):
        distances.append(float(trainer.forward_backward(batch(), algorithm, OF).kl_loss))
        trainer.optim_step(2e-3)
    assert distances[0] > 0 and distances[-1] < 0.5 * distances[0]


def test_an_entropy_bonus_alone_raises_the_entropy() -> None:
    config = config_of({"preset": "fp16"})
    trainer = trainer_for(config)
    algorithm = replace(ALGORITHM, entropy_coefficient=1.0)
    flat = [replace(pack, advantages_S=torch.zeros_like(pack.advantages_S)) for pack in packs(config)]
    entropies = []
    for _ in range(4):
        entropies.append(float(torch.cat([one.entropies_C for one in trainer.measure(flat)]).mean()))
        trainer.forward_backward(flat, algorithm, OF)
        trainer.optim_step(1e-3)
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0] + 1e-3


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_kept_version_scores_as_it_did_when_it_was_the_newest(name: str, tied: bool) -> None:
    precision, changes = PRECISIONS[name]
    trainer = trainer_for(config_of(precision, **changes), tied=tied, keep_reference=False)
    for _ in range(2):
        sampled = logprobs(trainer, "policy")
        trainer.keep_version()
        assert torch.equal(logprobs(trainer, "kept"), sampled)
        update(trainer, times=2)
        moved = logprobs(trainer, "policy")
        assert not torch.equal(moved, sampled)
        assert torch.equal(logprobs(trainer, "kept"), sampled)
        assert torch.equal(logprobs(trainer, "policy"), moved)


@pytest.mark.parametrize("name", ["fp16", "fp32", "islands"])
def test_a_kept_version_changes_nothing_in_the_training_and_is_no_reference(name: str) -> None:
    config = config_of(PRECISIONS[name][0])
    keeping, plain = trainer_for(config), trainer_for(config)
    start = logprobs(plain, "reference")
    for trainer in (keeping, plain):
        for _ in range(3):
            if trainer is keeping:
                trainer.keep_version()
            trainer.forward_backward(packs(config), ALGORITHM, OF)
            if trainer is keeping:
                trainer.measure_kept(packs(config))
            trainer.optim_step(1e-2)
    assert torch.equal(logprobs(keeping, "policy"), logprobs(plain, "policy"))
    assert torch.equal(logprobs(keeping, "reference"), start)
    kept, expected = keeping.state(), plain.state()
    for which in ("model", "optimizer"):
        held, wanted = getattr(kept, which), getattr(expected, which)
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[key], wanted[key]) for key in held)
