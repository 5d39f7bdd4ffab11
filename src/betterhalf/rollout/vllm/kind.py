"""Declaration of vLLM; see `rollout.capabilities.EngineKind`."""

from __future__ import annotations

from typing import Any

import torch

from betterhalf.config.schema import RunConfig, VllmEngineConfig
from betterhalf.precision.roles import Precision
from betterhalf.rollout.capabilities import EngineCapabilities, EngineKind
from betterhalf.rollout.vllm import options
from betterhalf.rollout.vllm.engine import VllmEngine


def _settings(config: RunConfig) -> VllmEngineConfig:
    assert isinstance(config.engine, VllmEngineConfig)
    return config.engine


def _capabilities(config: RunConfig) -> EngineCapabilities:
    return EngineCapabilities(
        max_restarts=_settings(config).max_restarts,
        fp32_islands=False,
        emulates=False,
        scores=True,
        traces=False,
        reports_support=False,
        shares_cores=False,
    )


def _check_architecture(hf_config: Any) -> None:
    options.architectures(hf_config)


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
    )


VLLM = EngineKind(
    families=None,
    capabilities=_capabilities,
    check_sampling=options.check_sampling,
    check_roles=options.check_cache_dtype,
    check_architecture=_check_architecture,
    require_installed=_require_installed,
    build=_build,
)
"""Entry of vLLM in `rollout.build.ENGINES`."""
