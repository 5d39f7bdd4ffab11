"""Decoder configurations read from transformers' own, and refusals."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_families import FAMILIES, WINDOW, family_config
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from betterhalf.errors import InputError
from betterhalf.ops import LogitTransform
from betterhalf.rollout.native.config import decoder_config

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_equal_transformers(kind):
    hf = LlamaConfig(**SIZES, max_position_embeddings=256, rope_parameters=ROPES[kind])
    reference = LlamaRotaryEmbedding(hf)
    (found,) = decoder_config(hf).ropes
    assert found.inv_freq == tuple(reference.inv_freq.tolist())
    assert found.scaling == reference.attention_scaling


def test_which_projections_have_biases():
    def biases(hf):
        found = decoder_config(hf)
        return found.qkv_bias, found.output_bias, found.mlp_bias

    assert biases(LlamaConfig(**SIZES)) == (False, False, False)
    assert biases(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)) == (True, True, True)
    assert biases(MistralConfig(**SIZES)) == (False, False, False)
    assert biases(Qwen2Config(**SIZES)) == (True, False, False)
    assert biases(Qwen3Config(**SIZES, attention_bias=True)) == (True, True, False)


def test_windows_slide_where_the_architecture_says():
    assert decoder_config(LlamaConfig(**SIZES)).windows == (None,) * 4
    assert decoder_config(MistralConfig(**SIZES, sliding_window=9)).windows == (9,) * 4
    assert decoder_config(MistralConfig(**SIZES, sliding_window=None)).windows == (None,) * 4
    qwen = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=3)
    assert decoder_config(qwen).windows == (None, None, None, 9)
    assert decoder_config(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=9)).windows == (None,) * 4


def test_head_size_may_differ_from_its_share_of_the_hidden_size():
    assert decoder_config(Qwen3Config(**SIZES, head_dim=32)).query_size == 128
    assert decoder_config(LlamaConfig(**SIZES)).query_size == 64


def of(name):
    return decoder_config(family_config(FAMILIES[name]))


def test_gemma_3_has_a_rope_and_a_window_by_layer_type():
    config = of("gemma3_text")
    assert config.windows == (WINDOW, None) * 2
    assert config.layer_ropes == (0, 1) * 2
    local, whole = config.ropes
    assert local.inv_freq[1] == pytest.approx(10_000 ** (-2 / 32)) and whole.inv_freq[1] == pytest.approx(
        1e6 ** (-2 / 32)
    )
    assert config.attention_scale == 24**-0.5 and config.embedding_scale == 8.0 and config.rounds_embedding_scale


def test_layers_without_positions_have_no_rope():
    assert of("smollm3").layer_ropes == (0, 0, None, 0)
    assert of("exaone4").layer_ropes == (0, None) * 2


def test_rope_may_cover_a_part_of_a_head_and_be_scaled_by_longrope():
    config = of("phi3, partial rope, longrope")
    assert len(config.ropes[0].inv_freq) == 12 and config.head_dim == 32
    short = [1 / ((1 + 0.1 * k) * 1e4 ** (2 * k / 24)) for k in range(12)]
    assert config.ropes[0].inv_freq == pytest.approx(short)
    assert config.max_positions == 47
    assert config.fused_names


def test_granite_multiplies_and_divides():
    config = of("granite")
    assert (config.embedding_scale, config.residual_scale, config.attention_scale) == (3.0, 0.3, 0.1)
    assert config.logits == LogitTransform(scale=1 / 1.5) and not config.rounds_embedding_scale


@pytest.mark.parametrize("name", ["llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "seed_oss", "cwm"])
def test_the_kernels_of_a_gpu_compute_llamas_block(name):
    assert of(name).has_kernels


@pytest.mark.parametrize("name", ["gemma", "gemma3_text", "olmo2", "olmo3", "smollm3", "granite", "exaone4"])
def test_other_blocks_take_torch_operations(name):
    assert not of(name).has_kernels


def test_an_unknown_architecture_is_refused_with_those_that_are_known():
    with pytest.raises(InputError, match="'gpt2'; use a model of one of llama, mistral, .*gemma3_text"):
        decoder_config(GPT2Config())


def test_another_activation_is_refused():
    with pytest.raises(InputError, match="gelu"):
        decoder_config(LlamaConfig(**SIZES, hidden_act="gelu"))


def test_rope_that_depends_on_the_sequence_is_refused():
    hf = LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(InputError, match="dynamic"):
        decoder_config(hf)


def test_inverse_frequencies_are_fp32_values():
    found = torch.tensor(decoder_config(LlamaConfig(**SIZES)).ropes[0].inv_freq, dtype=torch.float64)
    assert torch.equal(found, found.float().double())
