"""Which engine a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from betterhalf.config.schema import NativeEngineConfig, RunConfig, VllmEngineConfig
from betterhalf.precision.roles import Precision
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.native.config import decoder_config
from betterhalf.rollout.native.engine import NativeEngine, require_kernels
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.rollout.vllm.options import architectures, check_installed, check_sampling

_Builder = Callable[[RunConfig, Any, tuple[int, ...], Precision], RolloutEngine]


def _native(config: RunConfig, hf_config: Any, stop_token_ids: tuple[int, ...], precision: Precision) -> RolloutEngine:
    assert isinstance(config.engine, NativeEngineConfig)
    return NativeEngine(hf_config, precision=precision, config=config.engine, stop_token_ids=stop_token_ids)


def _vllm(config: RunConfig, hf_config: Any, stop_token_ids: tuple[int, ...], precision: Precision) -> RolloutEngine:
    assert isinstance(config.engine, VllmEngineConfig)
    check_sampling(config.sampling)
    return VllmEngine(
        hf_config,
        precision=precision,
        config=config.engine,
        stop_token_ids=stop_token_ids,
        seed=config.seed,
    )


_ENGINES: dict[str, _Builder] = {"native": _native, "vllm": _vllm}
"""`engine.type` -> builder."""


def check_engine(config: RunConfig) -> None:
    """Refuse what no model could make right, before anything of one is read.

    Raises:
        ConfigError: the engine cannot sample as told.
    """
    if config.engine.type == "vllm":
        check_sampling(config.sampling)


def check_architecture(config: RunConfig, hf_config: Any) -> None:
    """Refuse a model that the configured engine cannot compute, by its configuration alone.

    Raises:
        InputError: an architecture, activation or rope scaling that the native engine does not compute; or no causal
            language model.
    """
    if config.engine.type == "native":
        decoder_config(hf_config)
    else:
        architectures(hf_config)


def require_engine(config: RunConfig, device: torch.device) -> None:
    """Look for the packages that the engine needs, after everything that the user wrote has been found good.

    Raises:
        InputError: there is no Triton for the native engine on a GPU.
        MissingExtraError: vLLM is not installed.
    """
    if config.engine.type == "vllm":
        check_installed()
    else:
        require_kernels(device)


def build_engine(
    config: RunConfig, hf_config: Any, stop_token_ids: Iterable[int], precision: Precision
) -> RolloutEngine:
    """The engine that `config.engine.type` names, without weights.

    Args:
        config: of the run.
        hf_config: transformers configuration of the model.
        stop_token_ids: tokens that end a completion.
        policy: dtype roles and device.

    Raises:
        InputError: the engine does not know the architecture, or cannot do what is asked.
        MissingExtraError: the engine is not installed.
    """
    return _ENGINES[config.engine.type](config, hf_config, tuple(stop_token_ids), precision)
