"""Options for starting vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny_models import SMALL, tiny_config

from betterhalf.config.schema import PrecisionConfig, SamplingConfig, VllmEngineConfig
from betterhalf.errors import ConfigError
from betterhalf.precision.roles import Precision, build_precision
from betterhalf.rollout.vllm import options

CONFIG = tiny_config(sizes=SMALL, max_position_embeddings=255)


def precision(dtype: str = "fp16", device: str = "cpu") -> Precision:
    return build_precision(PrecisionConfig.model_validate({"preset": dtype}), torch.device(device))


def test_the_cache_is_no_larger_than_can_be_used() -> None:
    """Two blocks of 128 tokens hold 256 positions, one is spare; each token takes 2 x 3 x 2 x 16 values."""
    small = options.llm_options(Path("m"), CONFIG, VllmEngineConfig(max_concurrent=5), precision(), 0)
    assert small["kv_cache_memory_bytes"] == (5 * 3 + 1) * 128 * (2 * 3 * 2 * 16) * 2
    large = options.llm_options(Path("m"), CONFIG, VllmEngineConfig(kv_cache_gib=0.001), precision(), 0)
    assert large["kv_cache_memory_bytes"] == int(0.001 * 2**30)


def test_the_head_is_fp32_unless_told_otherwise() -> None:
    fp32 = options.llm_options(Path("m"), CONFIG, VllmEngineConfig(), precision(), 0)
    assert fp32["hf_overrides"] == {"head_dtype": "float32"}
    assert fp32["dtype"] == "float16"
    assert "hf_overrides" not in options.llm_options(
        Path("m"), CONFIG, VllmEngineConfig(head_dtype="model"), precision(), 0
    )


def test_a_gpu_gets_handles_sleep_and_compilation_a_cpu_none_of_them() -> None:
    gpu = options.llm_options(Path("m"), CONFIG, VllmEngineConfig(), precision(device="cuda"), 0)
    assert gpu["weight_transfer_config"] == {"backend": "ipc"}
    assert gpu["enable_sleep_mode"] and not gpu["enforce_eager"]
    cpu = options.llm_options(Path("m"), CONFIG, VllmEngineConfig(), precision(), 0)
    assert cpu["enforce_eager"] and not {"weight_transfer_config", "enable_sleep_mode"} & cpu.keys()
    assert "TORCHDYNAMO_DISABLE" in options.environment(VllmEngineConfig(), precision())
    assert "TORCHDYNAMO_DISABLE" not in options.environment(VllmEngineConfig(), precision(device="cuda"))


def test_two_gpus_load_from_a_file() -> None:
    config = VllmEngineConfig(tensor_parallel_size=2)
    assert options.transfer_backend(config, precision(device="cuda"), "object_store") is None
    assert "weight_transfer_config" not in options.llm_options(Path("m"), CONFIG, config, precision(device="cuda"), 0)


def test_the_model_file_names_its_architecture(tmp_path: Path) -> None:
    assert not CONFIG.architectures
    options.write_model(tmp_path, CONFIG)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["num_key_value_heads"] == 2


def test_temperatures_that_vllm_raises_are_refused() -> None:
    options.check_sampling(SamplingConfig(temperature=0.01))
    with pytest.raises(ConfigError, match="sampling.temperature"):
        options.check_sampling(SamplingConfig(temperature=0.009))


def test_vllm_is_told_the_whole_distribution() -> None:
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, max_tokens=9)
    assert options.distribution(sampling) == {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05}
    assert options.distribution(SamplingConfig()) == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
