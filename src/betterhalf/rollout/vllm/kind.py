"""Declaration of vLLM; see `rollout.capabilities.EngineKind`."""

from __future__ import annotations

from typing import Any

import torch

from betterhalf.config.schema import RunConfig, VllmEngineConfig
from betterhalf.precision.roles import Precision
from betterhalf.rollout.capabilities import EngineCapabilities, EngineKind
from betterhalf.rollout.vllm import options
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.rollout.vllm.nccl import NcclSender
from betterhalf.rollout.weight_group import WeightReceiver


def _settings(config: RunConfig) -> VllmEngineConfig:
    assert isinstance(config.engine, VllmEngineConfig)
    return config.engine


def _runs_eagerly(config: RunConfig) -> bool:
    """Return whether vLLM's passes can be observed: on a CPU, without torch.compile."""
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return on_cpu and not _settings(config).compile


def _capabilities(config: RunConfig) -> EngineCapabilities:
    return EngineCapabilities(
        max_restarts=_settings(config).max_restarts,
        fp32_islands=False,
        emulates=False,
        scores=True,
        traces=False,
        reports_support=False,
        reports_experts=_runs_eagerly(config),
        shares_cores=False,
        serves_adapters=True,
    )


def _check_architecture(config: RunConfig, hf_config: Any) -> None:
    options.architectures(hf_config)
    options.check_experts(hf_config, _settings(config).tensor_parallel_size)


def _require_installed(_device: torch.device) -> None:
    options.check_installed()


def _build(config: RunConfig, hf_config: Any, stop_token_ids: tuple[int, ...], precision: Precision) -> VllmEngine:
    options.check_sampling(config.sampling)
    return VllmEngine(
        hf_config,
        precision=precision,
        config=_settings(config),
        stop_token_ids=stop_token_ids,
        seed=config.seed,
        transfer=config.transfer if config.cluster.backend == "ray" else "object_store",
        shares_device=config.cluster.backend == "local" or config.cluster.placement == "colocated",
        lora=config.lora if config.lora.active and config.lora.merge == "adapter" else None,
    )


def _receiver(engine: Any, _device: torch.device) -> WeightReceiver:
    assert isinstance(engine, VllmEngine)
    return engine


VLLM = EngineKind(
    families=None,
    mixtures=("qwen3_moe",),
    capabilities=_capabilities,
    check_sampling=options.check_sampling,
    check_roles=options.check_cache_dtype,
    check_architecture=_check_architecture,
    require_installed=_require_installed,
    build=_build,
    sender=NcclSender,
    receiver=_receiver,
)
"""Entry of vLLM in `rollout.build.ENGINES`."""
