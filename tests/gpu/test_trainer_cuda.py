"""The trainer and whole runs on a CUDA device: FP32 equal to the CPU, half close to FP32, the contract met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import CUDA, tiny_model

from betterhalf.algorithms.presets import PRESETS
from betterhalf.config.schema import LossScaleConfig, RunConfig
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.loss_scaler import build_loss_scaler
from betterhalf.precision.roles import build_precision
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs.train import run_training
from betterhalf.training.on_device import on_device
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, Prompt, Rollout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def trainer_on(
    device: str, precision: str, islands: tuple[str, ...] = (), compiled: bool = False, **changes: Any
) -> tuple[PolicyTrainer, RunConfig]:
    """Build a tiny random trainer, with the same weights on every device."""
    family = "mistral" if "sliding_window" in changes else "llama"
    sizes = {**CUDA, "num_hidden_layers": 2, "max_position_embeddings": 256}
    model = tiny_model(family, sizes, seed=0, **changes)
    config = RunConfig.model_validate(
        {
            "precision": {"preset": precision, "fp32_modules": islands},
            "training": {"optimizer_steps": 1, "tokens_per_micro_batch": 100, "compile_layers": compiled},
            "sampling": {"max_tokens": 16},
        }
    )
    roles = build_precision(config.precision, torch.device(device))
    return PolicyTrainer(model, config=config, precision=roles), config


def rollouts() -> list[Rollout]:
    """Return sequences of different lengths: three siblings, three others, and three without siblings."""
    return [
        Rollout(
            prompt=Prompt(
                prompt_id="", text="", token_ids=tuple(range(1, 4 + (0, 0, 0, 3, 3, 3, 6, 7, 8)[k])), answer=""
            ),
            completion=Completion(
                token_ids=tuple(range(20, 25 + k)),
                behavior_logprobs=(-4.6,) * (5 + k),
                finish_reason="stop",
                policy_version=0,
            ),
            text="",
            reward=float(k % 2),
        )
        for k in range(9)
    ]


def learned(device: str, precision: str, **changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logprobs of all completion tokens and the unscaled gradients, on the CPU."""
    trainer, config = trainer_on(device, precision, **changes)
    advantages = [1.0 if k % 2 else -1.0 for k in range(9)]
    step = pack_step(rollouts(), advantages, config, step=1)
    logprobs = torch.cat([scores.logprobs_C for scores in trainer.measure(step.packs)])
    for pack, scores in zip(step.packs, trainer.measure(step.packs), strict=True):
        assert torch.equal(scores.logprobs_C, trainer.score(on_device(pack, torch.device(device))).detach().cpu())
    trainer.forward_backward(step.packs, PRESETS["pg_seq_is"], step.train_batches[0].denominators)
    return logprobs, {name: (g / trainer.scaler.scale).cpu() for name, g in trainer.weights.gradients()}


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, {"tie_word_embeddings": True}])
def test_fp32_equals_the_cpu(changes: dict[str, Any]) -> None:
    cpu_logprobs, cpu_gradients = learned("cpu", "fp32", **changes)
    logprobs, gradients = learned("cuda", "fp32", **changes)
    torch.testing.assert_close(logprobs, cpu_logprobs, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, cpu_gradients[name], rtol=1e-3, atol=1e-5)


ISLANDS = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn", "model.layers.0", "model.layers.*"]


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-2), ("bf16", 1e-1)])
@pytest.mark.parametrize("island", ISLANDS)
def test_gradients_with_islands_are_close_to_fp32(precision: str, bound: float, island: str) -> None:
    _, expected = learned("cuda", "fp32")
    _, gradients = learned("cuda", precision, islands=(island,))
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= bound * expected[name].norm(), name


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-2), ("bf16", 1e-1)])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}])
def test_half_gradients_are_close_to_fp32(precision: str, bound: float, changes: dict[str, Any]) -> None:
    _, expected = learned("cuda", "fp32", **changes)
    _, gradients = learned("cuda", precision, **changes)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= bound * expected[name].norm(), name


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_compiled_layers_learn_what_plain_ones_learn(precision: str, bound: float) -> None:
    torch.compiler.reset()
    _, expected = learned("cuda", "fp32")
    _, gradients = learned("cuda", precision, compiled=True)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= bound * expected[name].norm(), name


def test_digests_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(k): torch.randn(1000 + k, generator=generator).half() for k in range(3)}
    on_gpu = ((name, tensor.cuda()) for name, tensor in tensors.items())
    assert weights_digests(on_gpu) == weights_digests(tensors.items())


def test_the_scaler_finds_an_overflow_on_the_device() -> None:
    scaler = build_loss_scaler(LossScaleConfig(), "fp16")
    gradients = [("a", torch.ones(8, device="cuda")), ("b", torch.full((8,), float("inf"), device="cuda"))]
    report = scaler.unscale(gradients)
    assert report.found_inf
    assert report.first_offender == "b"
    assert gradients[0][1].tolist() == [2.0**-16] * 8


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_whole_run_keeps_the_contract(precision: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "device": "cuda",
            "precision": {"preset": precision},
            "sampling": {"max_tokens": 40},
            "training": {"steps": 3, "prompts_per_step": 8, "group_size": 8, "optimizer_steps": 2},
            "optimizer": {"learning_rate": 1e-4},
            "logging": {"console": "quiet"},
        }
    )
    run = RunDir.create(tmp_path / "run", resume=False)
    run_training(config, run, resume=False, label=precision)
    assert read_json(run.contract)["ok"] is True
    rows = read_jsonl(run.metrics)
    bound = {"fp16": 1e-5, "bf16": 1e-3, "fp32": 1e-8}[precision]
    assert all(0 <= row["mismatch/k3/mean"] < bound for row in rows)
    assert rows[-1]["policy/version"] + sum(row["optim/skipped"] for row in rows) == 6
