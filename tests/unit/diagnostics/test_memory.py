"""Planned bytes against the tensors of real trainers and engines, and the settings that are proposed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny_models import SMALL, tiny_config, tiny_model

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.batches import Denominators
from betterhalf.cluster.trained import policy_trainer
from betterhalf.config.load import configuration_of
from betterhalf.config.schema import NativeEngineConfig, RunConfig
from betterhalf.diagnostics.engine_memory import engine_items
from betterhalf.diagnostics.fitting import misfits, with_values
from betterhalf.diagnostics.memory import Setting, plan_memory
from betterhalf.diagnostics.sizes import GIB, Machine, MemoryItem, ModelSizes, StepSizes, item_size
from betterhalf.diagnostics.trainer_memory import layer_activations, rank_items
from betterhalf.examine.plan import model_sizes
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.native.engine import NativeEngine
from betterhalf.training.pack import pack_sequence
from betterhalf.training.policy_trainer import PolicyTrainer

CPU = torch.device("cpu")
HOST = Machine(gpu=False, memory_bytes=None)
STEP = StepSizes(pack_tokens=64, loss_tokens=63, train_passes=1, sequences=8, sequence_tokens=64)
ONE_AND_A_HALF = ModelSizes(
    parameters=1_543_714_304,
    active_parameters=1_543_714_304,
    layer_parameters=46_797_824,
    layers=28,
    hidden=1536,
    intermediate=8960,
    heads=12,
    kv_heads=2,
    head_dim=128,
    vocabulary=151_936,
    tied_head=True,
)


def by_name(items: tuple[MemoryItem, ...]) -> dict[str, int]:
    return {item.name.partition(" (")[0]: item.num_bytes for item in items}


def settings(**changes: Any) -> RunConfig:
    return configuration_of({"device": "cpu", "precision.half_matmul": "fp32_sums", **changes})


def trainer_of(family: str, config: RunConfig, **shape: Any) -> PolicyTrainer:
    model = tiny_model(family, SMALL, seed=0, **shape)
    return PolicyTrainer(model, config=config, precision=build_precision(config.precision, CPU))


def num_bytes(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def learned(trainer: PolicyTrainer) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Take one optimizer step on one pack; return the storages that its graph saved: address -> bytes, shape."""
    pack = pack_sequence([token % 90 for token in range(STEP.pack_tokens)])
    (scores,) = trainer.measure([pack])
    pack = replace(pack, proximal_logprobs_C=scores.logprobs_C, advantages_S=torch.ones(1))
    saved: dict[int, tuple[int, tuple[int, ...]]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tuple(tensor.shape)
        return tensor

    algorithm = resolve_algorithm(trainer.config.algorithm)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.forward_backward([pack], algorithm, Denominators(sequences=1, tokens=63, max_tokens=63))
    trainer.optim_step(1e-6)
    return saved


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_lasting_bytes_are_those_of_a_real_trainer(dtype: str, tied: bool) -> None:
    config = settings(precision=dtype) if dtype == "fp32" else settings(**{"precision.preset": dtype})
    trainer = trainer_of("qwen3", config, tie_word_embeddings=tied)
    learned(trainer)
    sizes = model_sizes(trainer.module.config)
    planned = by_name(rank_items(config, sizes, STEP, HOST, keeps_reference=False))
    masters = [master for _, master in trainer.weights.trainable()]
    states = [state[key] for state in trainer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert planned["masters"] == num_bytes(masters) == 4 * sizes.parameters
    assert planned["gradients"] == num_bytes([gradient for _, gradient in trainer.weights.gradients()])
    assert planned["AdamW states"] == num_bytes(states)
    if dtype == "fp32":
        assert "computing weights" not in planned and "widened weights" not in planned
        return
    assert planned["computing weights"] == num_bytes(list(trainer.module.parameters()))
    linear = [part for part in trainer.module.modules() if getattr(part, "_weight_wide", None) is not None]
    wide = num_bytes([part.weight_wide() for part in linear]) + num_bytes([trainer.head().logits_weight])
    # The norms, which are not widened, are counted too: 0.5% of this model, and less of a larger one.
    assert wide <= planned["widened weights"] <= 1.01 * wide


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_the_tensors_that_the_graph_saves(family: str, dtype: str, checkpointing: bool) -> None:
    config = settings(**{"precision.preset": dtype, "training.activation_checkpointing": checkpointing})
    trainer = trainer_of(family, config)
    sizes = model_sizes(trainer.module.config)
    weights = {tuple(parameter.shape) for parameter in trainer.module.parameters()}
    saved = [size for size, shape in learned(trainer).values() if shape not in weights]
    planned = by_name(rank_items(config, sizes, STEP, HOST, keeps_reference=False))["activations"]
    if checkpointing:
        # Hooks see what lasts until the backward pass, which then computes one layer at a time again.
        again, _ = layer_activations(sizes, 2 if dtype == "fp16" else 4, gpu=False)
        assert sum(saved) == pytest.approx(planned - STEP.pack_tokens * again, rel=0.15)
        return
    assert sum(saved) == pytest.approx(planned, rel=0.04)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_an_engine_holds_the_planned_weights_and_cache(dtype: str, tied: bool) -> None:
    config = settings(**{"precision.preset": dtype, "engine.max_concurrent": 4})
    model = tiny_model("llama", SMALL, seed=0, tie_word_embeddings=tied)
    precision = build_precision(config.precision, CPU)
    assert isinstance(config.engine, NativeEngineConfig)
    engine = NativeEngine(model.hf_config, precision=precision, config=config.engine, stop_token_ids=(1,))
    planned = by_name(engine_items(config, model_sizes(model.hf_config), STEP, HOST))
    held = num_bytes([tensor for parameter in engine._weights._parameters for tensor in [parameter.tensor]])
    assert planned["weights of the layers"] + planned["embedding and head"] == pytest.approx(held, rel=0.01)
    cache = engine._allocate(4, STEP.sequence_tokens, 8).cache
    assert planned["KV cache"] == num_bytes([cache.keys, cache.values])


def test_the_sizes_of_a_mixture_count_the_experts_that_compute() -> None:
    hf = tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2)
    sizes = model_sizes(hf)
    expert = 3 * hf.hidden_size * hf.intermediate_size
    assert sizes.parameters - sizes.active_parameters == hf.num_hidden_layers * 2 * expert
    assert sizes.experts_per_token == 2


def planned_for(gpus_of: int, **changes: Any) -> Setting:
    settings = {
        "cluster.backend": "ray",
        "cluster.trainers": gpus_of,
        "cluster.trainer.gpus": 1,
        "cluster.engine.gpus": 1,
        "cluster.engines": gpus_of,
    }
    step = StepSizes(pack_tokens=32768, loss_tokens=32000, train_passes=4, sequences=512, sequence_tokens=8400)
    config = configuration_of(settings | changes)
    return Setting(config=config, sizes=ONE_AND_A_HALF, step=step, machine=Machine(gpu=True, memory_bytes=80 * GIB))


def test_masters_gradients_and_states_are_divided_by_the_ranks_and_the_pass_is_not() -> None:
    one, eight = (by_name(plan_memory(planned_for(ranks)).processes[0].items) for ranks in (2, 8))
    assert one["masters"] == 4 * eight["masters"] == 4 * ONE_AND_A_HALF.parameters // 2
    assert one["activations"] == eight["activations"]


def test_traffic_of_fsdp_by_hand() -> None:
    traffic = plan_memory(planned_for(8)).traffic
    parameters = ONE_AND_A_HALF.parameters
    head = 151_936 * 1536
    # In each pass two gathers of the layers in FP16, and one reduction in FP32; a rank sends seven parts of eight.
    assert traffic.pass_bytes == (parameters - head) * (2 * 2 + 4) * 7 // 8
    # The head is gathered and reduced once.
    assert traffic.optimizer_step_bytes == 4 * traffic.pass_bytes + head * (2 + 4) * 7 // 8
    # Broadcast; the object store holds a copy only for an engine that is replaced.
    assert traffic.sync_bytes == 8 * 2 * parameters and traffic.store_bytes == 2 * parameters


@pytest.mark.parametrize(
    ("changes", "path", "versions"),
    [
        ({"cluster.trainer.gpus": 1, "cluster.engine.gpus": 1}, "NCCL broadcast from rank 0", 1),
        ({"cluster.trainer.gpus": 1, "cluster.engine.gpus": 1, "pipeline.max_staleness": 1}, "NCCL broadcast", 2),
        (
            {"cluster.trainer.gpus": 0.5, "cluster.engine.gpus": 0.5, "cluster.placement": "colocated"},
            "CUDA IPC from the rank on the same GPU",
            1,
        ),
        ({}, "object store", 2),
    ],
)
def test_the_path_of_the_weights_decides_how_many_versions_are_stored(
    changes: dict[str, Any], path: str, versions: int
) -> None:
    config = configuration_of({"cluster.backend": "ray", "engine.type": "vllm", **changes})
    traffic = plan_memory(Setting(config=config, sizes=ONE_AND_A_HALF, step=STEP, machine=HOST)).traffic
    assert traffic.path.startswith(path)
    wire = item_size(config.precision.roles().wire_dtype) * ONE_AND_A_HALF.parameters
    assert traffic.store_bytes == versions * wire and traffic.sync_bytes == wire


def test_a_local_run_sends_nothing() -> None:
    config = configuration_of({"device": "cpu"})
    traffic = plan_memory(Setting(config=config, sizes=ONE_AND_A_HALF, step=STEP, machine=HOST)).traffic
    assert traffic.pass_bytes == traffic.optimizer_step_bytes == traffic.store_bytes == 0
    assert traffic.path == "in the process of the run"


def test_what_does_not_fit_is_named_with_settings_that_fit() -> None:
    setting = planned_for(8)
    (sentence,) = [text for text in misfits(setting) if "of a rank" in text]
    assert "GPU of a rank needs" in sentence and "has 80.00 GiB" in sentence
    assert "training.activation_checkpointing=true" in sentence
    changed = with_values(setting, {"training.activation_checkpointing": True, "engine.max_concurrent": 64})
    assert changed is not None and plan_memory(changed).devices[0].fits


def test_everything_fits_a_device_of_unknown_size() -> None:
    setting = replace(planned_for(8), machine=Machine(gpu=True, memory_bytes=None))
    assert plan_memory(setting).fits and misfits(setting) == ()


def test_colocated_vllm_sleeps_while_the_rank_learns() -> None:
    shares = {"cluster.placement": "colocated", "cluster.trainer.gpus": 0.5, "cluster.engine.gpus": 0.5}
    setting = planned_for(8, **shares, **{"engine.type": "vllm", "engine.sleep": "auto"})
    awake = planned_for(8, **shares, **{"engine.type": "vllm", "engine.sleep": "never"})
    asleep_total, awake_total = (plan_memory(one).devices[0].total_bytes for one in (setting, awake))
    rank, engine = plan_memory(setting).processes
    assert asleep_total < awake_total == rank.total_bytes + engine.total_bytes


def test_no_gpu_holds_a_whole_model_that_is_sharded() -> None:
    large = replace(ONE_AND_A_HALF, parameters=30_500_000_000)
    setting = replace(planned_for(512, **{"training.prompts_per_step": 512}), sizes=large)
    rank = plan_memory(setting).processes[0]
    assert rank.total_bytes == sum(item.num_bytes for item in rank.items) < 4 * large.parameters
    assert rank.host_items == ()


def test_files_that_cannot_be_read_in_parts_are_whole_in_the_memory_of_one_host() -> None:
    setting = planned_for(8)
    (item,) = plan_memory(replace(setting, reads_rows=False)).processes[0].host_items
    assert (item.num_bytes, item.lasts) == (4 * ONE_AND_A_HALF.parameters, False) and "rank 0" in item.formula
    cpu = replace(setting, machine=HOST, reads_rows=False)
    assert plan_memory(cpu).processes[0].host_items == ()


@pytest.mark.parametrize("preset", ["fp16", "fp32"])
def test_adapters_are_planned_as_a_real_trainer_holds_them(preset: str) -> None:
    pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")
    config = settings(**{"precision": preset, "lora.rank": 4})
    model = tiny_model("llama", SMALL, seed=0)
    sizes = model_sizes(model.hf_config, lora=config.lora)
    precision = build_precision(config.precision, CPU)
    trainer = policy_trainer(model, config, precision, trained=None, keep_reference=False)
    planned = by_name(rank_items(config, sizes, STEP, HOST, keeps_reference=False))
    masters = [master.detach() for _, master in trainer.weights.trainable()]
    assert planned["masters"] == planned["gradients"] == num_bytes(masters) == 4 * sizes.adapters
    assert planned["AdamW states"] == 2 * num_bytes(masters)
    frozen = [each for each in trainer.module.parameters() if not each.requires_grad]
    base = planned["frozen base"] if preset == "fp32" else planned["computing weights"]
    assert base == num_bytes(frozen)
    # Every layer but norms and embedding is merged; of the rest nothing is sent again.
    sent = trainer.weight_stream().changed()  # type: ignore[attr-defined]
    assert sent is not None
    assert sizes.resent * (4 if preset == "fp32" else 2) == sent.num_bytes
