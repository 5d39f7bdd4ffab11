"""A decoder small enough to run in milliseconds, and an engine around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from betterhalf.config.schema import RunConfig
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.native.engine import NativeEngine

TINY: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def module() -> Any:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.float32).eval()


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
