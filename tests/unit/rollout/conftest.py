"""A decoder small enough to run in milliseconds, and an engine around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_config, tiny_module

from betterhalf.config.schema import RunConfig
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.native.engine import NativeEngine


@pytest.fixture(scope="session")
def module() -> Any:
    config = tiny_config(vocab_size=23, initializer_range=0.3, tie_word_embeddings=True)
    return tiny_module(config, seed=7)


@pytest.fixture
def wire(module: Any) -> Callable[[torch.dtype], list[tuple[str, torch.Tensor]]]:
    """Return the module's weights as a weight sync sends them."""
    return lambda dtype: [(name, parameter.detach().to(dtype)) for name, parameter in module.named_parameters()]


@pytest.fixture
def make_engine(module: Any, wire: Callable[..., Any]) -> Callable[..., NativeEngine]:
    """Return make_engine(precision="fp32", stop_token_ids=(), load=True, **engine settings)."""

    def make(
        precision: str | dict[str, Any] = "fp32",
        *,
        stop_token_ids: tuple[int, ...] = (),
        load: bool = True,
        **engine: Any,
    ) -> NativeEngine:
        section = {"preset": precision} if isinstance(precision, str) else precision
        config = RunConfig.model_validate({"precision": section, "engine": engine})
        roles = build_precision(config.precision, torch.device("cpu"))
        built = build_engine(config, module.config, stop_token_ids, roles)
        assert isinstance(built, NativeEngine)
        if load:
            built.load_weights(wire(roles.wire_dtype), policy_version=3)
        return built

    return make
