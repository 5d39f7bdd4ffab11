"""Adapters go into the layers that the configuration names, and the base keeps its names outside the trainer."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.tiny_models import EXPERTS, tiny_config, tiny_model

from betterhalf.config.schema import LoraConfig, ModelConfig, RunConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.models import adapter_names, adapters
from betterhalf.setup.model_checks import show_notes

pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")


def adapted(seed: int = 0, **lora: Any) -> Any:
    module = tiny_model("llama", seed=0).module
    adapters.add_adapters(module, LoraConfig(**{"rank": 2, **lora}), seed)
    return module


def test_every_linear_layer_but_the_head_gets_an_adapter_by_default() -> None:
    layers = adapters.adapted_linears(adapted())
    assert len(layers) == 2 * 7 and not any("lm_head" in layer.name for layer in layers)
    first = layers[0]
    assert first.name == "model.layers.0.self_attn.q_proj.weight"
    assert first.base == "model.layers.0.self_attn.q_proj.base_layer.weight"
    assert adapter_names.plain_name(first.base) == first.name
    assert adapter_names.served_name(first.down) == "model.layers.0.self_attn.q_proj.lora_A.weight"


def test_the_word_of_peft_means_every_linear_layer_and_an_empty_list_is_refused() -> None:
    assert LoraConfig(rank=2).target_modules == ("all-linear",)
    with pytest.raises(ValueError, match="lora.target_modules is empty.*or leave it out for all-linear"):
        LoraConfig(rank=2, target_modules=())


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("all-linear",), 14), (("q_proj", "v_proj"), 4), (("mlp.down_proj",), 2), (("layers.1.mlp.up_proj",), 1)],
)
def test_targets_are_the_last_parts_of_names(targets: tuple[str, ...], count: int) -> None:
    assert len(adapters.adapted_linears(adapted(target_modules=targets))) == count


def test_only_adapters_are_trained_and_they_start_at_the_base() -> None:
    module = adapted()
    trained = dict(adapters.trained_parameters(module))
    assert len(trained) == 2 * 14 and all(".lora_" in name for name in trained)
    assert all(not value.any() for name, value in trained.items() if ".lora_B." in name)
    ids, plain = torch.arange(9)[None], tiny_model("llama", seed=0).module
    assert torch.equal(module(ids).logits, plain(ids).logits)


def test_the_seed_alone_determines_the_adapters() -> None:
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    one = adapted().get_parameter(name)
    torch.rand(5)
    assert torch.equal(one, adapted().get_parameter(name))
    assert not torch.equal(one, adapted(seed=1).get_parameter(name))


@pytest.mark.parametrize(
    ("lora", "scale"),
    [({"rank": 8}, 2.0), ({"rank": 8, "alpha": 4}, 0.5), ({"rank": 4, "alpha": 4, "rank_stabilised": True}, 2.0)],
)
def test_the_scale_is_that_of_peft(lora: dict[str, Any], scale: float) -> None:
    assert LoraConfig(**lora).scale == scale
    assert {layer.scale for layer in adapters.adapted_linears(adapted(**lora))} == {scale}


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 2, "target_modules": ("qproj",)}, "matches no linear layer.*did you mean q_proj"),
        ({"rank": 2, "target_modules": ("lm_head",)}, "the LM head cannot have an adapter"),
        ({"rank": 17}, r"lora.rank=17 exceeds a side of model.layers.0.self_attn.k_proj, which is 16 x 32"),
    ],
)
def test_adapters_that_a_model_cannot_have_are_refused_before_weights_are_read(lora: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        adapters.check_adapters(tiny_config(), LoraConfig(**lora), ModelConfig())


@pytest.mark.parametrize("target", ["experts", "mlp.experts.gate_up_proj", "down_proj", "experts.0.up_proj"])
def test_experts_are_refused_by_name_with_the_layers_that_can_have_adapters(target: str) -> None:
    words = (
        rf"names '{target}', which are experts in this model .model\.layers\.0\.mlp\.experts\.gate_up_proj .*"
        r"Train adapters on q_proj, k_proj, v_proj, o_proj, or all weights with lora\.rank=0"
    )
    with pytest.raises(InputError, match=words):
        adapters.check_adapters(
            tiny_config("qwen3_moe", **EXPERTS), LoraConfig(rank=2, target_modules=(target,)), ModelConfig()
        )
    with pytest.raises(InputError, match=r"matches no linear layer.*did you mean q_proj"):
        adapters.check_adapters(
            tiny_config("qwen3_moe", **EXPERTS), LoraConfig(rank=2, target_modules=("query_proj",)), ModelConfig()
        )


def test_by_default_a_mixture_trains_its_attention_and_the_user_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("qwen3_moe", seed=0, **EXPERTS)
    lora = LoraConfig(rank=2)
    assert {name.rpartition(".")[2] for name in adapters.target_modules(model.module, lora)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
    }
    show_notes(model.facts(), "plain", lora)
    assert "experts and routers of model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 0, "alpha": 8}, "lora.alpha is set, but lora.rank=0"),
        ({"rank": 4, "dropout": 0.1}, "lora.dropout=0.1 would make the trained policy random"),
        ({"rank": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(lora: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LoraConfig(**lora)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"engine": {"rounding": "exact"}}, "engine.rounding=exact needs the same operations"),
        ({"training": {"compile_layers": True}}, "training.compile_layers cannot trace the layers of PEFT"),
    ],
)
def test_settings_that_adapters_rule_out_are_refused(other: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate({"lora": {"rank": 2}, **other})


def test_peft_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install betterhalf\[lora\]"):
        adapters.check_adapters(tiny_config(), LoraConfig(rank=2), ModelConfig())
    adapters.check_adapters(tiny_config(), LoraConfig(), ModelConfig())
