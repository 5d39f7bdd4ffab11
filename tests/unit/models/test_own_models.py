"""Checkpoints as people have them: sharded, BF16, padded vocabularies, settings of sampling, GGUF quantisations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from betterhalf.config.schema import ModelConfig, PrecisionRoles
from betterhalf.errors import InputError
from betterhalf.models.description import describe_model
from betterhalf.models.loading import LoadedModel, load_model, load_weights
from betterhalf.precision.weight_range import require_weights_fit

PADDING = 5
"""Rows that padded models have beyond the demo model's vocabulary."""


@pytest.fixture
def demo() -> LoadedModel:
    return load_model(ModelConfig(name="demo"))


def saved(model: LoadedModel, folder: Path, **arguments: Any) -> str:
    model.module.save_pretrained(folder, **arguments)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def padded(model: LoadedModel, folder: Path) -> str:
    """Save the model with padding rows that would be sampled often."""
    module = model.module
    module.resize_token_embeddings(module.config.vocab_size + PADDING, mean_resizing=False)
    with torch.no_grad():
        module.lm_head.weight[-PADDING:] = 3.0
    return saved(model, folder)


def test_sharded_safetensors_are_loaded_whole(demo: LoadedModel, tmp_path: Path) -> None:
    folder = saved(demo, tmp_path / "model", max_shard_size="400KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    again = load_model(ModelConfig(name=folder))
    assert all(torch.equal(x, y) for x, y in zip(again.module.parameters(), demo.module.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_stay_what_they_are(demo: LoadedModel, tmp_path: Path, tied: bool) -> None:
    if tied:
        demo.module.config.tie_word_embeddings = True
        demo.module.lm_head.weight = demo.module.model.embed_tokens.weight
    again = load_model(ModelConfig(name=saved(demo, tmp_path / "model"))).module
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again.lm_head.weight, demo.module.lm_head.weight)


def test_a_bf16_weight_beyond_fp16_is_refused_with_its_name_and_value(demo: LoadedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        demo.module.model.layers[1].mlp.up_proj.weight[3, 4] = -70000.0
        demo.module.model.norm.weight[0] = 65504.0
    demo.module.bfloat16()  # tests may cast a whole module: nothing is computed with it
    with torch.no_grad():
        demo.module.model.norm.weight[0] = 65024.0
    model = load_model(ModelConfig(name=saved(demo, tmp_path / "model")))
    with pytest.raises(InputError) as caught:
        require_weights_fit(model.module.named_parameters(), roles("fp16"))
    message = str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight" in message and "-70144" in message and "precision=bf16" in message
    for dtype in ("bf16", "fp32"):
        require_weights_fit(model.module.named_parameters(), roles(dtype))


def roles(dtype: Any) -> PrecisionRoles:
    return PrecisionRoles(
        master_dtype="fp32",
        compute_dtype=dtype,
        wire_dtype=dtype,
        rollout_dtype=dtype,
        kv_dtype=dtype,
        logits_dtype="fp32",
        reduce_dtype="fp32",
    )


def test_padding_ids_are_left_out_of_model_and_distribution(demo: LoadedModel, tmp_path: Path) -> None:
    tokens = demo.hf_config.vocab_size
    folder = padded(demo, tmp_path / "model")
    described = describe_model(ModelConfig(name=folder))
    assert described.hf_config.vocab_size == tokens and described.file_vocabulary == tokens + PADDING
    assert any(f"{PADDING} of its {tokens + PADDING} ids have no token" in note for note in described.notes)
    model = load_weights(described)
    assert model.hf_config.vocab_size == model.module.config.vocab_size == tokens
    assert model.module.lm_head.weight.shape[0] == model.module.model.embed_tokens.weight.shape[0] == tokens
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(tokens).unsqueeze(0)
    with torch.no_grad():
        ours, padded_logits = model.module(ids).logits, whole(ids).logits
    assert torch.allclose(ours, padded_logits[..., :tokens], atol=1e-5)
    # The padding had probability mass, which the smaller model gives to the tokens.
    assert float(padded_logits.softmax(-1)[..., tokens:].sum(-1).max()) > 1e-6
    assert torch.allclose(ours.softmax(-1).sum(-1), torch.ones(1, tokens))


def test_a_stop_token_among_the_padding_keeps_its_row(demo: LoadedModel, tmp_path: Path) -> None:
    folder = Path(padded(demo, tmp_path / "model"))
    tokens = demo.tokenizer.get_vocab()
    stop = max(tokens.values()) + 2
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [demo.stop_token_ids[0], stop]}))
    described = describe_model(ModelConfig(name=str(folder)))
    assert described.hf_config.vocab_size == stop + 1 and stop in described.stop_token_ids
    assert set(demo.stop_token_ids) < set(described.stop_token_ids)


def test_settings_of_sampling_in_the_files_are_noted_and_not_applied(demo: LoadedModel, tmp_path: Path) -> None:
    folder = Path(saved(demo, tmp_path / "model"))
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    (note,) = (note for note in describe_model(ModelConfig(name=str(folder))).notes if "generation_config" in note)
    assert "temperature=0.6, top_p=0.95, top_k=20" in note and "[sampling]" in note
    assert not any("asks for" in note for note in describe_model(ModelConfig(name="demo")).notes)


QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", [*QUANTISATIONS, "IQ4_NL", "IQ4_XS", "TQ1_0"])
def test_a_gguf_file_gives_the_values_of_its_quantisation(
    kind: str, tmp_path: Path, write_gguf: Callable[..., Path]
) -> None:
    """Weights are compared with the dequantisation of the package gguf; a row of 256 is the block of every kind."""
    gguf = pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "model.gguf", quantisation=kind)
    model = load_model(ModelConfig(name=str(path)))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, theirs in (("token_embd", "model.embed_tokens"), ("blk.0.ffn_down", "model.layers.0.mlp.down_proj")):
        tensor = stored[f"{name}.weight"]
        assert tensor.tensor_type.name == kind
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(model.module.get_parameter(f"{theirs}.weight"), expected.float())
        assert float(expected.abs().max()) > 0
