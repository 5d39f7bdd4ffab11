"""Declaration of a rollout engine: its capabilities, its checks, and its builder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from betterhalf.config.schema import PrecisionRoles, RunConfig, SamplingConfig
from betterhalf.distributed.group import Membership
from betterhalf.precision.roles import Precision
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.weight_group import GroupReceiver, GroupSender, Layout, WeightReceiver, WeightSender


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """Capabilities of an engine in one configuration, known before anything is loaded."""

    max_restarts: int
    """Maximum number of restarts after a crash in one step; 0 for an engine without a process of its own."""
    fp32_islands: bool
    """True if it computes the modules of `precision.fp32_modules` in FP32."""
    emulates: bool
    """True if it computes in emulated formats."""
    scores: bool
    """True if `RolloutEngine.score` is implemented."""
    traces: bool
    """True if the built engine is a `rollout.tracing.TracedEngine`."""
    reports_support: bool = False
    """True if completions come with the tokens that truncated sampling could draw, where a request asks for them."""
    reports_experts: bool = False
    """True if completions of a mixture of experts come with the experts that computed them, where a request asks."""
    shares_cores: bool
    """True if it keeps to the thread count of its process, so that several runs can share the cores of a CPU."""
    serves_adapters: bool = False
    """True if it computes with LoRA adapters beside the weights, for `lora.merge=adapter`."""
    reports_top_tokens: bool = False
    """True if completions come with the most likely tokens at each position, for `algorithm.score_centering`."""


class EngineBuilder(Protocol):
    """Builder of an engine without weights; see `rollout.build.build_engine`."""

    def __call__(
        self, config: RunConfig, hf_config: Any, stop_token_ids: tuple[int, ...], precision: Precision
    ) -> RolloutEngine:
        """Build the engine.

        Raises:
            InputError: the engine cannot do what the configuration asks.
            MissingExtraError: its package is not installed.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """One entry of `rollout.build.ENGINES`, supplied by the engine's own package."""

    families: tuple[str, ...] | None
    """transformers `model_type` values that the engine computes; None if that is known only after loading the model."""
    capabilities: Callable[[RunConfig], EngineCapabilities]
    """Function that returns what the engine can do as configured."""
    check_sampling: Callable[[SamplingConfig], None]
    """Check that raises ConfigError for sampling settings that the engine cannot apply."""
    check_roles: Callable[[PrecisionRoles], None]
    """Check that raises ConfigError for dtype roles that the engine cannot apply."""
    check_architecture: Callable[[RunConfig, Any], None]
    """Check that raises InputError for a transformers configuration of these families that it cannot compute as
    configured."""
    require_installed: Callable[[torch.device], None]
    """Check that raises InputError or MissingExtraError if a package that it needs on this device is missing."""
    build: EngineBuilder
    """Builder of the engine without weights."""
    mixtures: tuple[str, ...] = ()
    """Mixtures of experts among `families` that are known to work; no message recommends the engine for others."""
    sender: Callable[[Membership, torch.device, Layout], WeightSender] = GroupSender
    """Builder of the sending end of a weight group on rank 0, which joins the group when it is built."""
    receiver: Callable[[Any, torch.device], WeightReceiver] = GroupReceiver
    """Builder of the receiving end in the process of the engine, given the engine and its device; it joins later."""
