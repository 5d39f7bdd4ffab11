"""Models are refused by the name of what the trainer cannot compute, before their weights are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_families import FAMILIES, TinyFamily, family_config
from torch import nn
from transformers import AutoModelForCausalLM

from betterhalf.errors import InputError
from betterhalf.models.packability import require_packable


def skeleton(family: TinyFamily) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        "gemma3_text",
        "phi3, partial rope, longrope",
        "olmo3",
        "smollm3",
        "granite",
        "cohere2",
        "gpt2",
    ],
)
def test_decoders_that_attention_alone_connects_are_accepted(name: str) -> None:
    require_packable(skeleton(FAMILIES[name]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama, rope dynamic", "rope scaling 'dynamic'.*set rope_parameters"),
        ("phi", "LM head has a bias"),
        ("mamba2", "linear_attention.*packed sequences would leak"),
        ("lfm2", "conv.*packed sequences would leak"),
        ("bloom", "an attention of its own"),
        ("gpt_oss", "attention sinks"),
        ("nemotron", "do not pass keywords on"),
        ("diffllama", "4 layers call the attention function 8 times"),
        ("doge", "a mask of its own"),
        ("minicpm3", "multi-head latent attention"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(InputError, match=f"architecture '{FAMILIES[name].model_type}' cannot be trained: .*{words}"):
        require_packable(skeleton(FAMILIES[name]))


class ScaledHead(nn.Linear):
    """A head of an unknown kind."""


def test_a_head_of_another_class_is_refused() -> None:
    module = skeleton(FAMILIES["llama"])
    module.lm_head = ScaledHead(64, 61, bias=False, device="meta")
    with pytest.raises(InputError, match="no linear layer \\(ScaledHead\\)"):
        require_packable(module)


def test_an_unknown_change_of_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = skeleton(FAMILIES["cohere"])
    module.config.model_type = "unheard_of"
    with pytest.raises(InputError, match="changes its logits after the LM head"):
        require_packable(module)


def test_a_change_of_the_hidden_states_before_the_head_is_refused() -> None:
    module = skeleton(FAMILIES["llama"])
    module.lm_head.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    with pytest.raises(InputError, match="changes the hidden states"):
        require_packable(module)


def test_attention_in_both_directions_is_refused() -> None:
    module = skeleton(FAMILIES["gemma3_text"])
    for layer in module.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(InputError, match="is not causal"):
        require_packable(module)


def test_images_are_refused_with_the_way_out() -> None:
    config = FAMILIES["gemma3_text"]
    module = skeleton(config)
    module.config.get_text_config = lambda: object()
    with pytest.raises(InputError, match="save its language model alone"):
        require_packable(module)
