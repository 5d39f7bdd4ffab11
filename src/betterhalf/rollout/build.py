"""Select, check and build the rollout engine that a configuration names.

To add an engine: a section of the configuration with a `type` of its own, a package with its `EngineKind`, and one line
in `ENGINES`. An engine outside this package is named by the import path of its `EngineKind` (`engine.type = "python"`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch

from betterhalf.config.sampling import require_support
from betterhalf.config.schema import PythonEngineConfig, RunConfig
from betterhalf.distributed.group import Membership
from betterhalf.errors import ConfigError, InputError
from betterhalf.models.description import ModelFacts, is_mixture
from betterhalf.precision.roles import Precision
from betterhalf.rollout.capabilities import EngineCapabilities, EngineKind
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.native.kind import NATIVE
from betterhalf.rollout.tracing import TracedEngine
from betterhalf.rollout.vllm.kind import VLLM
from betterhalf.rollout.weight_group import Layout, WeightReceiver, WeightSender
from betterhalf.user_code import load_object

ENGINES: dict[str, EngineKind] = {"native": NATIVE, "vllm": VLLM}
"""`engine.type` -> the engine's declaration."""


def capabilities(config: RunConfig) -> EngineCapabilities:
    """Return what the configured engine can do; nothing is loaded.

    Engines in processes of the cluster are restarted by the pool alone, within one call: a caller that restarted them
    too would need the trainer's weights in the middle of its step.
    """
    declared = _kind(config).capabilities(config)
    return declared if config.cluster.backend == "local" else replace(declared, max_restarts=0)


def check_engine(config: RunConfig) -> None:
    """Refuse sampling settings that the configured engine cannot apply, before anything of a model is read.

    Raises:
        ConfigError: the engine cannot sample with these settings.
    """
    _kind(config).check_sampling(config.sampling)


def check_training_sampling(config: RunConfig) -> None:
    """Refuse truncated sampling in training with an engine that does not report the tokens that it kept.

    Raises:
        ConfigError: the settings truncate, and the engine does not declare `reports_support`.
    """
    reports = capabilities(config).reports_support
    require_support(config.sampling, config.engine.type, reports_support=reports)


def check_replay(config: RunConfig) -> None:
    """Refuse routing replay with an engine that does not report its experts.

    Raises:
        ConfigError: `algorithm.routing_replay` is set, and the engine does not declare `reports_experts`.
    """
    if config.algorithm.routing_replay and not capabilities(config).reports_experts:
        raise ConfigError(
            f"algorithm.routing_replay=true needs the experts that the engine chose, which engine.type="
            f"{config.engine.type} does not report; set engine=native, or algorithm.routing_replay=false"
        )


def reports_experts(config: RunConfig, model: ModelFacts) -> bool:
    """Return whether completions of this model can come with their experts."""
    return model.has_experts and capabilities(config).reports_experts


def check_engine_roles(config: RunConfig) -> None:
    """Refuse dtype roles that the configured engine cannot apply.

    Raises:
        ConfigError: the engine cannot hold or compute what the roles say.
    """
    _kind(config).check_roles(config.precision.roles())


def check_adapters_served(config: RunConfig) -> None:
    """Refuse `lora.merge=adapter` with an engine that computes without adapters.

    Raises:
        ConfigError: the message says what to set.
    """
    if _serves_adapters(config) and not capabilities(config).serves_adapters:
        raise ConfigError(
            f"lora.merge=adapter needs an engine that computes with adapters beside the weights, and engine.type="
            f"{config.engine.type} does not; set engine=native, or lora.merge=weights"
        )
    if _serves_adapters(config) and config.cluster.backend == "ray" and config.transfer != "object_store":
        raise ConfigError(
            f"lora.merge=adapter does not work with cluster.transfer={config.transfer}; set "
            "cluster.transfer=object_store, or lora.merge=weights"
        )


def _serves_adapters(config: RunConfig) -> bool:
    return config.lora.active and config.lora.merge == "adapter"


def check_architecture(config: RunConfig, hf_config: Any) -> None:
    """Refuse a model that the configured engine cannot compute, by its configuration alone.

    Raises:
        InputError: the engine does not compute the architecture, the activation or the rope scaling, or the model is no
            causal language model. For an unknown architecture the message names the engines that may compute it.
    """
    kind = _kind(config)
    if not _may_compute(kind, hf_config):
        others = " or ".join(f"engine={name}" for name, other in ENGINES.items() if _is_hinted(other, hf_config))
        raise InputError(
            f"the {config.engine.type} engine does not know architecture {hf_config.model_type!r}; use a model of one "
            f"of {', '.join(kind.families or ())}{f', or set {others}' if others else ''}"
        )
    kind.check_architecture(config, hf_config)


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


def open_sender(config: RunConfig, membership: Membership, device: torch.device, layout: Layout) -> WeightSender:
    """Join a weight group as rank 0; see `rollout.weight_group`.

    Raises:
        RunError, RuntimeError: a member did not join in time.
    """
    return _kind(config).sender(membership, device, layout)


def receiver_of(config: RunConfig, engine: RolloutEngine, device: torch.device) -> WeightReceiver:
    """Return the receiving end of a weight group for an engine that `build_engine` built in this process."""
    return _kind(config).receiver(engine, device)


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


def _is_hinted(kind: EngineKind, hf_config: Any) -> bool:
    """Return whether a message may recommend the engine for a model."""
    known = not is_mixture(hf_config) or hf_config.model_type in kind.mixtures
    return known and _may_compute(kind, hf_config)


def _kind(config: RunConfig) -> EngineKind:
    if not isinstance(config.engine, PythonEngineConfig):
        return ENGINES[config.engine.type]
    found = load_object(config.engine.kind, "engine.kind")
    if not isinstance(found, EngineKind):
        raise ConfigError(
            f"engine.kind={config.engine.kind} is {type(found).__name__}; name a betterhalf.rollout.capabilities."
            "EngineKind (docs/extending.md has an example)"
        )
    return found
