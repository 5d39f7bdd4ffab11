"""Declaration of the native engine; see `rollout.capabilities.EngineKind`."""

from __future__ import annotations

from typing import Any

from betterhalf.config.schema import NativeEngineConfig, PrecisionRoles, RunConfig, SamplingConfig
from betterhalf.precision.roles import Precision
from betterhalf.rollout.capabilities import EngineCapabilities, EngineKind
from betterhalf.rollout.native.config import SUPPORTED_ARCHITECTURES, decoder_config
from betterhalf.rollout.native.engine import NativeEngine, require_kernels


def _capabilities(_config: RunConfig) -> EngineCapabilities:
    return EngineCapabilities(
        max_restarts=0,
        fp32_islands=True,
        emulates=True,
        scores=True,
        traces=True,
        shares_cores=True,
        reports_top_tokens=True,
        reports_support=True,
        serves_adapters=True,
        reports_experts=True,
    )


def _check_sampling(_sampling: SamplingConfig) -> None:
    """Accept all settings."""


def _check_roles(_roles: PrecisionRoles) -> None:
    """Accept all roles."""


def _check_architecture(_config: RunConfig, hf_config: Any) -> None:
    decoder_config(hf_config)


def _build(config: RunConfig, hf_config: Any, stop_token_ids: tuple[int, ...], precision: Precision) -> NativeEngine:
    assert isinstance(config.engine, NativeEngineConfig)
    return NativeEngine(
        hf_config,
        precision=precision,
        config=config.engine,
        stop_token_ids=stop_token_ids,
        top_tokens=config.algorithm.score_centering,
        lora=config.lora if config.lora.active and config.lora.merge == "adapter" else None,
    )


NATIVE = EngineKind(
    families=SUPPORTED_ARCHITECTURES,
    mixtures=("qwen3_moe",),
    capabilities=_capabilities,
    check_sampling=_check_sampling,
    check_roles=_check_roles,
    check_architecture=_check_architecture,
    require_installed=require_kernels,
    build=_build,
)
"""Entry of the native engine in `rollout.build.ENGINES`."""
