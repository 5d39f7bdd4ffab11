"""Select, check and build the rollout engine that a configuration names.

To add an engine: a section of the configuration with a `type` of its own, a package with its `EngineKind`, and one line
in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch

from betterhalf.config.sampling import require_support
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.precision.roles import Precision
from betterhalf.rollout.capabilities import EngineCapabilities, EngineKind
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.native.kind import NATIVE
from betterhalf.rollout.tracing import TracedEngine
from betterhalf.rollout.vllm.kind import VLLM

ENGINES: dict[str, EngineKind] = {"native": NATIVE, "vllm": VLLM}
"""`engine.type` -> the engine's declaration."""


def capabilities(config: RunConfig) -> EngineCapabilities:
    """Return what the configured engine can do; nothing is loaded."""
    return _kind(config).capabilities(config)


def check_engine(config: RunConfig) -> None:
    """Refuse sampling settings that the configured engine cannot apply, before anything of a model is read.

    Raises:
        ConfigError: the engine cannot sample with these settings.
    """
    _kind(config).check_sampling(config.sampling)


def check_training_sampling(config: RunConfig) -> None:
    """Refuse truncated sampling in training with an engine that does not report what it truncated to.

    Raises:
        ConfigError: the settings truncate, and the engine does not declare `reports_support`.
    """
    reports = capabilities(config).reports_support
    require_support(config.sampling, config.engine.type, reports_support=reports)


def check_engine_roles(config: RunConfig) -> None:
    """Refuse dtype roles that the configured engine cannot apply.

    Raises:
        ConfigError: the engine cannot hold or compute what the roles say.
    """
    _kind(config).check_roles(config.precision.roles())


def check_architecture(config: RunConfig, hf_config: Any) -> None:
    """Refuse a model that the configured engine cannot compute, by its configuration alone.

    Raises:
        InputError: the engine does not compute the architecture, the activation or the rope scaling, or the model is no
            causal language model. For an unknown architecture the message names the engines that may compute it.
    """
    kind = _kind(config)
    if not _may_compute(kind, hf_config):
        others = " or ".join(f"engine={name}" for name, other in ENGINES.items() if _may_compute(other, hf_config))
        raise InputError(
            f"the {config.engine.type} engine does not know architecture {hf_config.model_type!r}; use a model of one "
            f"of {', '.join(kind.families or ())}{f', or set {others}' if others else ''}"
        )
    kind.check_architecture(hf_config)


def require_engine(config: RunConfig, device: torch.device) -> None:
    """Require the packages that the engine needs. Called after everything that the user wrote has been checked.

    Raises:
        InputError: there is no Triton for the native engine on a GPU.
        MissingExtraError: vLLM is not installed.
    """
    _kind(config).require_installed(device)


def build_engine(
    config: RunConfig, hf_config: Any, stop_token_ids: Iterable[int], precision: Precision
) -> RolloutEngine:
    """Build the engine that `config.engine.type` names, without weights.

    Args:
        config: configuration of the run.
        hf_config: transformers configuration of the model.
        stop_token_ids: tokens that end a completion.
        precision: dtype roles and device.

    Raises:
        InputError: the engine does not know the architecture, or cannot do what is asked.
        MissingExtraError: the engine is not installed.
    """
    return _kind(config).build(config, hf_config, tuple(stop_token_ids), precision)


def build_traced_engine(
    config: RunConfig, hf_config: Any, stop_token_ids: Iterable[int], precision: Precision
) -> TracedEngine:
    """Build an engine whose operations can be traced; see `build_engine`.

    Raises:
        InputError: the engine shows no operations (`EngineCapabilities.traces`), or one of `build_engine`.
    """
    if not capabilities(config).traces:
        raise InputError(f"engine.type={config.engine.type} does not show its operations; set engine=native")
    return cast(TracedEngine, build_engine(config, hf_config, stop_token_ids, precision))


def _may_compute(kind: EngineKind, hf_config: Any) -> bool:
    return kind.families is None or hf_config.model_type in kind.families


def _kind(config: RunConfig) -> EngineKind:
    return ENGINES[config.engine.type]
