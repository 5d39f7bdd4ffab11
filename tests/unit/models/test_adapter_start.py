"""An adapter that PEFT has written is continued as it is, and one that does not fit is refused before weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapter_folders import peft_adapter
from tests.tiny_models import skeleton_model, tiny_config, tiny_model

from betterhalf.config.adapter_folder import fill_from_adapter, read_adapter_folder
from betterhalf.config.load import configuration_of, resolved_json
from betterhalf.config.schema import LoraConfig, ModelConfig, RunConfig
from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import InputError
from betterhalf.models import adapters
from betterhalf.models.adapter_start import AdaptedSource, starting_values

pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")

IDS = torch.arange(12)[None]
BASE = ModelConfig(name="org/tiny")


def written(folder: Path, **settings: Any) -> tuple[str, Any]:
    return str(folder), peft_adapter(tiny_model(seed=0).module, folder, **settings)


def config_of(folder: str, **lora: Any) -> LoraConfig:
    return configuration_of({"lora": {"adapter": folder, **lora}}).lora


def changed(folder: Path, **settings: Any) -> str:
    """Write an adapter, and change its configuration file."""
    path, _ = written(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
        {"target_modules": r".*layers\.1\..*(k|v)_proj"},
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
        {"use_rslora": True, "lora_alpha": 3, "r": 9},
        {"dtype": torch.bfloat16},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_an_adapter_of_peft_gives_the_same_logits_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    folder, theirs = written(tmp_path, **settings)
    lora, model = config_of(folder), tiny_model(seed=0)
    base = model.module(IDS).logits
    adapters.check_adapters(model.hf_config, lora, BASE)
    adapters.add_adapters(model.module, lora, seed=7)
    assert torch.equal(model.module(IDS).logits, theirs(IDS).logits)
    assert not torch.equal(model.module(IDS).logits, base), "the adapter is not 0"


def test_an_adapter_of_ours_gives_the_same_logits_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    folder, _ = written(tmp_path / "first", target_modules=["v_proj", "o_proj"])
    ours, lora = tiny_model(seed=0).module, config_of(folder)
    adapters.add_adapters(ours, lora, seed=0)
    (tmp_path / "again").mkdir()
    adapters.save_adapter(ours, lora, tmp_path / "again", ModelConfig(name="demo"), {})
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["target_modules"] == [
        "o_proj",
        "v_proj",
    ]
    theirs = PeftModel.from_pretrained(tiny_model(seed=0).module, str(tmp_path / "again"))
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    assert config_of(str(tmp_path / "again")) == lora.model_copy(update={"adapter": str(tmp_path / "again")})


def test_ranks_read_their_rows_of_it(tmp_path: Path) -> None:
    folder, theirs = written(tmp_path)
    lora, model = config_of(folder), tiny_model(seed=0)
    parts = skeleton_model(model)
    adapters.add_adapters(parts.module, lora, seed=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in parts.module.named_parameters()}
    wanted = {name: ShardRange(first=1, count=2, shape=shape) for name, shape in shapes.items()}
    source = AdaptedSource(parts.weights, starting_values(lora, 0))
    values = dict(source.rows(wanted))
    assert values.keys() == shapes.keys()
    for name, value in theirs.named_parameters():
        if ".lora_" in name:
            assert torch.equal(values[name.removeprefix("base_model.model.")], value[1:3])


def test_settings_that_are_left_out_are_those_of_the_adapter(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj"])
    lora = config_of(folder)
    assert (lora.rank, lora.alpha, lora.rank_stabilised, lora.target_modules) == (3, 5.0, True, ("v_proj",))
    assert config_of(folder, rank=8).alpha == 5.0, "each by itself"
    whole = configuration_of({"lora": {"adapter": folder}})
    (tmp_path / "adapter_config.json").unlink()
    assert RunConfig.model_validate_json(json.dumps(resolved_json(whole))) == whole
    filled = resolved_json(whole)["lora"]
    assert fill_from_adapter(filled, targets_given=True) == filled, "nothing is read again"


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, "lora.rank=8, and the adapter in .* has 4; leave out lora.rank"),
        ({"alpha": 4}, "lora.alpha=4, and the adapter in .* has 8; leave out lora.alpha"),
        ({"rank_stabilised": True}, "lora.rank_stabilised=true, and the adapter in .* has false"),
        ({"target_modules": ["q_proj"]}, "adapts .*, which lora.target_modules does not choose; leave out"),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(lora: Any, words: str, tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    with pytest.raises(InputError, match=words):
        adapters.check_adapters(tiny_config(), config_of(folder, **lora), BASE)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]])
def test_targets_that_the_adapter_lacks_are_refused(targets: list[str], tmp_path: Path) -> None:
    folder, _ = written(tmp_path, target_modules=["q_proj"])
    lora = config_of(folder, target_modules=targets)
    with pytest.raises(InputError, match="does not adapt model.layers.0.*, which"):
        adapters.check_adapters(tiny_config(), lora, BASE)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"hidden_size": 64},
            r"of shape \[32, 4\], and in that model it belongs to a weight of 64 x 48; set model.name=org/first",
        ),
        ({"num_hidden_layers": 1}, "layers.1.* there is no such linear layer; set model.name=org/first"),
    ],
)
def test_an_adapter_of_a_model_of_another_shape_is_refused(model: Any, words: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, base_model_name_or_path="org/first")
    with pytest.raises(InputError, match=words):
        adapters.check_adapters(tiny_config(**model), config_of(folder), BASE)


@pytest.mark.parametrize(
    ("base", "revision", "fits"),
    [
        ("org/tiny", None, True),
        ("/copies/Tiny", None, True),
        (None, None, True),
        ("org/tiny", "v2", False),
        ("org/other", None, False),
        ("demo", None, False),
    ],
)
def test_an_adapter_that_names_another_base_is_refused(
    base: str | None, revision: str | None, fits: bool, tmp_path: Path
) -> None:
    folder = changed(tmp_path, base_model_name_or_path=base, revision=revision)
    if fits:
        adapters.check_adapters(tiny_config(), config_of(folder), BASE)
        return
    with pytest.raises(InputError, match="set model.revision=v2" if revision else "set model.name="):
        adapters.check_adapters(tiny_config(), config_of(folder), BASE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "all"}, 'bias="all"'),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights="pissa_niter_4"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"a_key_of_the_future": 1}, "a_key_of_the_future=1"),
    ],
)
def test_kinds_of_adapters_that_are_not_computed_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{words}.*merge_and_unload.*set model.name"):
        config_of(changed(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, "r=8, and the weights have rank 4"),
        ({"lora_alpha": "much"}, "is damaged"),
        ({"r": None}, "r=None"),
        ({"peft_type": None}, "of type None"),
    ],
)
def test_damaged_settings_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        config_of(changed(tmp_path, **settings))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file is mapped
    for content in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        weights.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            read_adapter_folder(folder)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, weights)
    with pytest.raises(InputError, match=r"lm_head.lora_A.weight, and this project"):
        read_adapter_folder(folder)
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, weights)
    with pytest.raises(InputError, match="not finite"):
        adapters.add_adapters(tiny_model(seed=0).module, config_of(folder), 0)
    weights.unlink()
    with pytest.raises(InputError, match="save it again with save_pretrained"):
        read_adapter_folder(folder)


def test_what_is_no_adapter_is_refused_with_what_it_is(tmp_path: Path) -> None:
    for made, words in (("", "name the folder"), ("checkpoints", "it is a run"), ("config.json", "a whole model")):
        (tmp_path / made).mkdir(exist_ok=True) if made == "checkpoints" else made and (tmp_path / made).touch()
        if made == "config.json":
            (tmp_path / "checkpoints").rmdir()
        with pytest.raises(InputError, match=words):
            read_adapter_folder(str(tmp_path))
    with pytest.raises(InputError, match="there is no such folder"):
        read_adapter_folder(str(tmp_path / "nowhere"))
