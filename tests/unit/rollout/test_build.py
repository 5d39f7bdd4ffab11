"""Every engine declares its capabilities; no other code asks which engine it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, OlmoeConfig

import betterhalf
from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError, InputError
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import (
    ENGINES,
    build_traced_engine,
    capabilities,
    check_architecture,
    check_engine,
    check_engine_roles,
)
from betterhalf.runs.side_by_side import plan_runs

SRC = Path(betterhalf.__file__).parent
ASKS = re.compile(r"engine\.type\s*(?:[!=]=|in\b)|isinstance\([^)]*Engine(?:Config)?\)")
"""Pattern of code that asks which engine it is."""


def config(engine: dict[str, Any], **changes: Any) -> RunConfig:
    return RunConfig.model_validate({"engine": engine, **changes})


def test_every_type_of_the_configuration_has_an_engine() -> None:
    with pytest.raises(Exception, match="native") as caught:
        config({"type": "none of them"})
    assert all(name in str(caught.value) for name in ENGINES)
    for name in ENGINES:
        assert capabilities(config({"type": name})).max_restarts >= 0


def test_engines_declare_what_they_can_do() -> None:
    native, vllm = capabilities(config({"type": "native"})), capabilities(config({"type": "vllm", "max_restarts": 2}))
    assert (native.max_restarts, vllm.max_restarts) == (0, 2)
    assert (native.fp32_islands, native.traces, native.shares_cores) == (True, True, True)
    assert (vllm.fp32_islands, vllm.traces, vllm.shares_cores) == (False, False, False)
    assert native.scores and vllm.scores


def test_no_module_outside_an_engine_asks_which_engine_it_is() -> None:
    own = {SRC / "rollout" / name for name in ENGINES}
    table = SRC / "rollout" / "build.py"  # it finds the kind of an engine, also one of the user's own
    files = [file for file in SRC.rglob("*.py") if not own & set(file.parents) and file != table]
    asking = [str(file) for file in files if ASKS.search(file.read_text(encoding="utf-8"))]
    assert not asking, "ask `rollout.build.capabilities`"
    assert any(ASKS.search((folder / "kind.py").read_text(encoding="utf-8")) for folder in own)


def test_checks_are_those_of_the_configured_engine() -> None:
    cold, kv = {"sampling": {"temperature": 0.001}}, {"precision": {"preset": "fp16", "kv_dtype": "fp32"}}
    for check, settings in ((check_engine, cold), (check_engine_roles, kv)):
        check(config({"type": "native"}, **settings))
        with pytest.raises(ConfigError, match="vLLM"):
            check(config({"type": "vllm"}, **settings))


def test_an_architecture_is_known_to_one_engine_and_not_to_the_other(module: Any) -> None:
    other = type(module.config)(**module.config.to_dict() | {"architectures": ["NewForCausalLM"]})
    other.model_type = "new"
    check_architecture(config({"type": "vllm"}), other)
    words = "the native engine does not know architecture 'new'; use a model of one of llama, .*, or set engine=vllm"
    with pytest.raises(InputError, match=words):
        check_architecture(config({"type": "native"}), other)


@pytest.mark.parametrize("experts", [MixtralConfig, OlmoeConfig])
def test_no_engine_is_hinted_for_a_mixture_that_it_is_not_known_to_run(experts: Any) -> None:
    with pytest.raises(InputError, match="does not know architecture") as caught:
        check_architecture(config({"type": "native"}), experts())
    assert "engine=vllm" not in str(caught.value)


def test_only_an_engine_that_traces_is_built_to_be_traced(module: Any) -> None:
    precision = build_precision(config({}).precision, torch.device("cpu"))
    traced = build_traced_engine(config({"type": "native"}), module.config, (), precision)
    assert traced.decoder.tap is None
    with pytest.raises(InputError, match="engine.type=vllm does not show its operations; set engine=native"):
        build_traced_engine(config({"type": "vllm"}), module.config, (), precision)


def test_arms_run_at_once_where_engines_share_the_cores() -> None:
    shared = plan_runs(config({"type": "native"}, device="cpu"), 2, 1000, wanted=0, key="")
    assert "takes all cores" not in shared.reason
    spread = RunConfig.model_validate({"cluster": {"backend": "ray"}})
    assert plan_runs(spread, 2, 1000, wanted=0, key="").at_once == 1
    alone = plan_runs(config({"type": "vllm"}, device="cpu"), 2, 1000, wanted=0, key="")
    assert (alone.at_once, alone.reason) == (1, "engine.type=vllm takes all cores")
