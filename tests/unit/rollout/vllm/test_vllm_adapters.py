"""Adapters that vLLM serves: their shapes, the folder that they are sent in, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from betterhalf.config.schema import LoraConfig, VllmEngineConfig
from betterhalf.errors import ConfigError
from betterhalf.rollout.vllm import adapters

SHAPES = {
    "model.embed_tokens.weight": (31, 8),
    "model.layers.0.self_attn.q_proj.weight": (6, 8),
    "model.layers.0.self_attn.q_proj.bias": (6,),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.input_layernorm.weight": (8,),
    "lm_head.weight": (31, 8),
}


def test_every_matrix_of_a_layer_may_have_an_adapter() -> None:
    found = adapters.adapter_shapes(SHAPES, LoraConfig(rank=2))
    assert found == {
        "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (6, 2),
        "model.layers.0.mlp.down_proj.lora_A.weight": (2, 12),
        "model.layers.0.mlp.down_proj.lora_B.weight": (8, 2),
    }
    assert len(adapters.adapter_shapes(SHAPES, LoraConfig(rank=2, target_modules=("down_proj",)))) == 2


def test_vllm_gets_room_for_the_next_rank_that_it_knows() -> None:
    assert adapters.llm_options(LoraConfig(rank=6)) == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}


@pytest.mark.parametrize(
    ("lora", "engine", "words"),
    [
        ({"rank": 4, "alpha": 6}, {}, "needs a scale that is a power of two.*alpha / rank is 1.5; set lora.alpha=8"),
        ({"rank": 513}, {}, "rank 512 at most"),
        ({"rank": 4}, {"tensor_parallel_size": 2}, "set engine.tensor_parallel_size=1"),
    ],
)
def test_adapters_that_could_not_be_verified_are_refused(lora: Any, engine: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        adapters.check_served(LoraConfig(**lora), VllmEngineConfig(**engine))


def test_an_adapter_is_sent_as_peft_writes_it() -> None:
    pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")
    tensors = {name: torch.ones(shape) for name, shape in adapters.adapter_shapes(SHAPES, LoraConfig(rank=2)).items()}
    seen: dict[str, Any] = {}

    def ask(verb: str, path: str, served: adapters.Served) -> None:
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        saved = load_file(Path(path) / "adapter_model.safetensors")
        seen.update(verb=verb, r=config["r"], alpha=config["lora_alpha"], names=set(saved), served=served)

    adapters.send_adapter(ask, tensors, LoraConfig(rank=2))
    assert (seen["verb"], seen["r"], seen["alpha"]) == ("load_adapter", 2, 4.0)
    assert seen["names"] == {f"base_model.model.{name}" for name in tensors}
    assert seen["served"] == adapters.Served(names=frozenset(tensors), rank=2, scale=2.0)


def test_what_is_read_back_has_neither_padding_nor_the_scale() -> None:
    """vLLM pads the rank to 8, fuses queries, keys and values, and holds B times the scale."""
    layer = SimpleNamespace(
        lora_a_stacked=tuple(torch.full((1, 1, 8, 4), float(k)) for k in range(3)),
        lora_b_stacked=tuple(torch.full((1, 1, 6, 8), 2.0 * k) for k in range(3)),
    )
    model = SimpleNamespace(
        named_modules=lambda: [("model.layers.1.self_attn.qkv_proj", layer), ("lm_head", layer)],
        packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
    )
    prefix = "model.layers.1.self_attn.v_proj.lora_"
    served = adapters.Served(names=frozenset({f"{prefix}A.weight", f"{prefix}B.weight"}), rank=3, scale=2.0)
    found = dict(adapters.held_adapters(model, served))
    assert {name: (tuple(x.shape), x.unique().tolist()) for name, x in found.items()} == {
        f"{prefix}A.weight": ((3, 4), [2.0]),
        f"{prefix}B.weight": ((6, 3), [2.0]),
    }
