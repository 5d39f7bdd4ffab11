"""Rows read from safetensors files have the bits of the model that is loaded whole, and damaged files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model_folders import VOCABULARY, as_bin, rewrite, tensors_of, write_model
from tests.tiny_families import FAMILIES, family_config, family_module
from torch import Tensor

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError
from betterhalf.models import weight_files
from betterhalf.models.description import describe_model
from betterhalf.models.files import ModelSource
from betterhalf.models.loading import LoadedModel, SkeletonModel, load_weights, open_weights
from betterhalf.models.weight_files import whole_reason
from betterhalf.training.weights.rows import rows_of


def both(folder: Path) -> tuple[LoadedModel, SkeletonModel]:
    """Return the model loaded whole, and without its weights."""
    described = describe_model(ModelConfig(name=str(folder)))
    opened = open_weights(described)
    assert opened is not None
    return load_weights(described), opened


def assert_same(whole: LoadedModel, opened: SkeletonModel, world_size: int) -> None:
    """Compare names, tied pairs, configuration, notes, buffers and the rows of every rank, bit for bit."""
    expected = dict(whole.module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in opened.module.named_parameters()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in expected.items()}
    assert opened.hf_config.tie_word_embeddings == whole.hf_config.tie_word_embeddings
    assert (opened.notes, opened.stop_token_ids) == (whole.notes, whole.stop_token_ids)
    assert not opened.module.training
    buffers = dict(opened.module.named_buffers())
    assert buffers.keys() == dict(whole.module.named_buffers()).keys()
    for name, buffer in whole.module.named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
    found: dict[str, list[Tensor]] = {name: [] for name in expected}
    for rank in range(world_size):
        wanted = {name: rows_of(shape, rank, world_size) for name, shape in shapes.items()}
        for name, rows in opened.weights.rows(wanted):
            assert rows.shape == (wanted[name].count, *shapes[name][1:]), name
            found[name].append(rows.float())
    for name, parameter in expected.items():
        assert torch.equal(torch.cat(found[name]), parameter), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_all_ranks_are_the_weights_of_the_whole_model(tmp_path: Path, dtype: Any, world_size: int) -> None:
    folder = write_model(tmp_path, "qwen3", dtype=dtype, head_dim=4, tie_word_embeddings=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(*both(folder), world_size)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_models_with_a_head_of_their_own_are_read(tmp_path: Path, family: str) -> None:
    assert_same(*both(write_model(tmp_path, family, tie_word_embeddings=False)), 2)


def test_one_file_is_read_like_many(tmp_path: Path) -> None:
    folder = write_model(tmp_path, shard="1GB")
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert_same(*both(folder), 3)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rope_is_computed_and_not_left_empty(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = write_model(tmp_path, rope_parameters={"rope_theta": 10000.0, **rope})
    whole, opened = both(folder)
    assert_same(whole, opened, 2)
    assert opened.module.model.rotary_emb.inv_freq.dtype == torch.float32
    assert opened.module.model.rotary_emb.attention_scaling == whole.module.model.rotary_emb.attention_scaling


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_experts_are_stacked_as_transformers_stacks_them(tmp_path: Path, family: str, world_size: int) -> None:
    sizes = {"num_local_experts": 12} if family == "mixtral" else {"num_experts": 12, "moe_intermediate_size": 16}
    folder = write_model(tmp_path, family, **sizes)
    assert any(".experts.11." in name for name in tensors_of(folder)), "the files hold one tensor for each expert"
    whole, opened = both(folder)
    assert any(parameter.shape[0] == 12 and parameter.dim() == 3 for parameter in whole.module.parameters())
    assert_same(whole, opened, world_size)


def test_a_lost_expert_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mixtral", num_local_experts=4)
    weights = tensors_of(folder)
    lost = next(name for name in weights if ".experts.2." in name)
    rewrite(folder, {name: tensor for name, tensor in weights.items() if name != lost})
    with pytest.raises(InputError, match="restore its files"):
        open_weights(describe_model(ModelConfig(name=str(folder))))


def test_a_tied_pair_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    folder = write_model(tmp_path, tie_word_embeddings=True)
    weights = tensors_of(folder)
    matrix = weights.pop("model.embed_tokens.weight")
    assert "lm_head.weight" not in weights
    rewrite(folder, weights | {"lm_head.weight": matrix})
    assert_same(*both(folder), 2)
    rewrite(folder, weights | {"lm_head.weight": matrix.clone(), "model.embed_tokens.weight": matrix})
    assert_same(*both(folder), 2)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_left_out_as_in_the_whole_model(tmp_path: Path, tied: bool) -> None:
    whole, opened = both(write_model(tmp_path, vocab_size=VOCABULARY + 48, tie_word_embeddings=tied))
    assert opened.module.lm_head.weight.shape[0] == whole.module.lm_head.weight.shape[0] < VOCABULARY + 48
    assert_same(whole, opened, 3)


def test_a_head_that_differs_from_the_embedding_is_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path, tie_word_embeddings=True)
    weights = tensors_of(folder)
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    rewrite(folder, weights | {"lm_head.weight": head})
    whole, opened = both(folder)
    assert not opened.hf_config.tie_word_embeddings and "differs from the embedding" in opened.notes[-1]
    assert_same(whole, opened, 2)


def test_names_without_the_models_prefix_and_unknown_weights_are_accepted_as_from_pretrained_does(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path, tie_word_embeddings=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors_of(folder).items()}
    rewrite(folder, weights | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "other": torch.ones(2)})
    assert_same(*both(folder), 2)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_weights_are_refused_in_the_same_words_as_by_the_whole_model(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path, tie_word_embeddings=False)
    rewrite(folder, {other: tensor for other, tensor in tensors_of(folder).items() if other != name})
    described = describe_model(ModelConfig(name=str(folder)))
    with pytest.raises(InputError, match=name) as of_rows:
        open_weights(described)
    with pytest.raises(InputError) as of_whole:
        load_weights(described)
    assert str(of_rows.value) == str(of_whole.value)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    weights = tensors_of(folder)
    weights["model.norm.weight"] = torch.ones(31)
    rewrite(folder, weights)
    with pytest.raises(InputError, match=r"'model.norm.weight' in shape \(31,\), and its config.json asks for \(32,\)"):
        open_weights(describe_model(ModelConfig(name=str(folder))))


def test_a_truncated_file_and_a_lost_one_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    described = describe_model(ModelConfig(name=str(folder)))
    path = max(folder.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        open_weights(described)
    path.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        open_weights(described)


def reason_of(folder: Path) -> str | None:
    """Return the reason of `whole_reason`, which must be there exactly if `open_weights` declines the model."""
    described = describe_model(ModelConfig(name=str(folder)))
    found = whole_reason(described.source, described.hf_config)
    assert (found is None) == (open_weights(described) is not None)
    return found


def test_the_reason_for_loading_a_model_whole_is_known_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_model(tmp_path / "experts", "qwen3_moe", num_experts=12, moe_intermediate_size=16)
    assert reason_of(experts) is None
    module = load_weights(describe_model(ModelConfig(name=str(experts)))).module
    # A rule that makes other tensors of those in the files; none of the decoders that are trained has one yet.
    monkeypatch.setattr(weight_files, "_keeps_rows", lambda rule: False)
    assert reason_of(experts) == "conversion"
    for file in experts.glob("*.safetensors*"):
        file.unlink()
    module.save_pretrained(experts, save_original_format=False)
    assert reason_of(experts) is None, "the fix that `plan` names"
    assert reason_of(as_bin(write_model(tmp_path / "bin"))) == "format"


def test_buffers_that_only_the_files_hold_are_a_reason(tmp_path: Path) -> None:
    module = family_module(family_config(FAMILIES["apertus"]))
    module.save_pretrained(tmp_path)
    source = ModelSource(location=str(tmp_path), arguments={})
    assert whole_reason(source, module.config) == "buffers"


def test_files_that_are_damaged_or_not_here_are_no_reason(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    source = ModelSource(location=str(folder), arguments={})
    hf_config = describe_model(ModelConfig(name=str(folder))).hf_config
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:10])
    assert whole_reason(source, hf_config) is None
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert whole_reason(source, hf_config) is None


def test_other_formats_have_to_be_loaded_whole(tmp_path: Path) -> None:
    described = describe_model(ModelConfig(name=str(as_bin(write_model(tmp_path)))))
    assert open_weights(described) is None
    assert load_weights(described).module.lm_head.weight.shape == (VOCABULARY, 32)
