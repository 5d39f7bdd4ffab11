"""Options for starting vLLM: keyword arguments of its `LLM`, environment, and the model's configuration file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from betterhalf.config.schema import PrecisionRoles, SamplingConfig, VllmEngineConfig
from betterhalf.errors import ConfigError, InputError, MissingExtraError
from betterhalf.models.context import context_length
from betterhalf.models.description import is_mixture
from betterhalf.precision.formats import dtype_keyword
from betterhalf.precision.roles import Precision
from betterhalf.rollout.vllm.refusals import INSTALL
from betterhalf.types import TransferName

_GIB = 2**30
_BLOCK = 128
"""Tokens in a block of vLLM's CPU cache, the largest block of any platform."""

_MIXTURES = ("qwen3_moe", "qwen2_moe", "olmoe")
"""Mixtures of experts whose weights have the names of `models.expert_names` in vLLM; tests.family_matrix runs each."""

_MIN_TEMPERATURE = 0.01
"""Lowest temperature that vLLM applies; it replaces a lower one by this."""


def check_installed() -> None:
    """Require vLLM, without importing it.

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            f"engine.type=vllm needs vLLM, which is not installed. Set engine=native, or install vLLM. {INSTALL}"
        )


def check_supported(precision: Precision) -> None:
    """Refuse precision settings that vLLM does not support, before anything is started.

    Raises:
        InputError: the KV dtype differs from the rollout dtype, or there are FP32 islands.
    """
    check_cache_dtype(precision.roles)
    if precision.fp32_modules:
        raise InputError(
            "vLLM computes all modules in one dtype, so precision.fp32_modules cannot be applied in it; "
            "empty it, or set engine=native"
        )


def check_cache_dtype(roles: PrecisionRoles) -> None:
    """Refuse a dtype of keys and values other than the one vLLM computes in.

    Raises:
        ConfigError: `precision.kv_dtype` differs from the rollout dtype.
    """
    if roles.kv_dtype != roles.rollout_dtype:
        raise ConfigError(
            f"vLLM keeps keys and values in the dtype it computes in, {roles.rollout_dtype}, not in {roles.kv_dtype}; "
            "drop precision.kv_dtype, or set engine=native"
        )


def check_experts(hf_config: Any, tensor_parallel_size: int) -> None:
    """Refuse experts that vLLM holds under other names, and experts that do not divide among the devices.

    Raises:
        InputError: the first weight sync would fail, or the width of an expert is no multiple of the number of devices.
    """
    if is_mixture(hf_config) and hf_config.model_type not in _MIXTURES:
        raise InputError(
            f"engine=vllm is not known to hold the experts of architecture {hf_config.model_type!r} under the "
            "trainer's names, so that the first weight sync would fail; use a mixture of one of "
            f"{', '.join(_MIXTURES)}, or an engine of your own (engine.type=python). betterhalf doctor examines the "
            "model without an engine"
        )
    width = getattr(hf_config, "moe_intermediate_size", None)
    if width is not None and width % tensor_parallel_size:
        raise InputError(
            f"engine.tensor_parallel_size={tensor_parallel_size} does not divide the width of the model's experts "
            f"({width}, moe_intermediate_size in config.json); set it to a divisor, such as 1"
        )


def check_sampling(sampling: SamplingConfig) -> None:
    """Refuse a temperature that vLLM would replace by another without reporting it to the trainer.

    Raises:
        ConfigError: it is below 0.01.
    """
    if sampling.temperature < _MIN_TEMPERATURE:
        raise ConfigError(
            f"vLLM raises temperatures below {_MIN_TEMPERATURE} to {_MIN_TEMPERATURE}, so {sampling.temperature:g} "
            f"cannot be applied; set sampling.temperature to {_MIN_TEMPERATURE} or more, or engine=native"
        )


def distribution(sampling: SamplingConfig) -> dict[str, float]:
    """Return the keyword arguments of `vllm.SamplingParams` that define the distribution."""
    return sampling.model_dump(include={"temperature", "top_p", "top_k", "min_p"})


def write_model(folder: Path, hf_config: Any) -> None:
    """Write `config.json`, all that vLLM needs to build the model; weights and tokens come from the run."""
    data = hf_config.to_dict()
    data.pop("quantization_config", None)
    data["architectures"] = architectures(hf_config)
    (folder / "config.json").write_text(json.dumps(data, default=str), encoding="utf-8")


def architectures(hf_config: Any) -> list[str]:
    """Return the class names by which vLLM looks up the model.

    Raises:
        InputError: the configuration names no causal language model.
    """
    if hf_config.architectures:
        return list(hf_config.architectures)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    if name is None:
        raise InputError(
            f"the model's type {hf_config.model_type!r} names no causal language model of transformers; choose another "
            "model"
        )
    return [name]


def llm_options(
    folder: Path,
    hf_config: Any,
    config: VllmEngineConfig,
    precision: Precision,
    seed: int,
    *,
    transfer: TransferName = "object_store",
    shares_device: bool = True,
    adapters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.LLM`, as plain values that can be sent to the child.

    Args:
        folder: holds the model's configuration.
        hf_config: transformers configuration.
        config: configuration of the engine.
        precision: dtype roles and device.
        seed: vLLM's own seed.
        transfer: path of the weights from other processes.
        shares_device: True if the trainer uses the same GPU, so that vLLM has to be able to sleep.
        adapters: keyword arguments that make room for LoRA adapters.
    """
    on_cpu = precision.device.type == "cpu"
    options: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": dtype_keyword(precision.roles.rollout_dtype),
        "kv_cache_dtype": "auto",
        # One more than the context: vLLM samples a token after each prompt it scores, but never computes with it.
        "max_model_len": context_length(hf_config) + 1,
        "max_num_seqs": config.max_concurrent,
        "enforce_eager": not uses_compile(config, precision),
        "generation_config": "vllm",
        # Logprobs of the tempered distribution that is sampled from.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": config.prefix_caching,
        # Cascade attention sums in another order, and on some GPUs wrongly (vLLM issue 22103).
        "disable_cascade_attn": True,
        "tensor_parallel_size": config.tensor_parallel_size,
        "seed": seed,
        "disable_log_stats": True,
        "worker_extension_cls": "betterhalf.rollout.vllm.worker.BetterhalfWorker",
    }
    options |= adapters or {}
    if config.head_dtype == "fp32":
        options["hf_overrides"] = {"head_dtype": dtype_keyword("fp32")}
    if on_cpu:
        return options | {"kv_cache_memory_bytes": _cache_bytes(hf_config, config, precision)}
    options["gpu_memory_utilization"] = config.gpu_memory_utilization
    options["enable_sleep_mode"] = config.sleep == "auto" and shares_device
    backend = transfer_backend(config, precision, transfer)
    if backend is not None:
        options["weight_transfer_config"] = {"backend": backend}
    return options


def uses_compile(config: VllmEngineConfig, precision: Precision) -> bool:
    """Return whether vLLM compiles: as configured, or by default on a GPU only."""
    return precision.device.type != "cpu" if config.compile is None else config.compile


def transfer_backend(config: VllmEngineConfig, precision: Precision, transfer: TransferName) -> str | None:
    """Return the backend of vLLM's weight-transfer API, `nccl` or `ipc`; None if weights are loaded from files."""
    if precision.device.type != "cuda":
        return None
    if transfer == "nccl":
        return "nccl"
    return "ipc" if config.takes_handles else None


def _cache_bytes(hf_config: Any, config: VllmEngineConfig, precision: Precision) -> int:
    """Return bytes for keys and values on a CPU: as many as can be used at once, at most `engine.kv_cache_gib`."""
    allowed = int(config.kv_cache_gib * _GIB)
    heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    token = 2 * hf_config.num_hidden_layers * heads * head_dim * precision.rollout_dtype.itemsize
    blocks = -(-(context_length(hf_config) + 1) // _BLOCK) + 1
    needed: int = (config.max_concurrent * blocks + 1) * _BLOCK * token
    return min(allowed, needed)


def environment(config: VllmEngineConfig, precision: Precision) -> dict[str, str]:
    """Return environment variables of the child: one process, offline, without usage statistics."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.batch_invariant:
        variables["VLLM_BATCH_INVARIANT"] = "1"
    if precision.device.type == "cpu" and not uses_compile(config, precision):
        # vLLM's sampler compiles its ranking of tokens at the first request even with `enforce_eager`; on a CPU that
        # calls a C++ compiler and takes longer than the start.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables
