"""Every verb refuses a model that its configuration files rule out, before the weights are read."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from betterhalf.models import loading

DEMO = Path(loading.__file__).parent / "demo"
ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "experiments" / "smoke" / "demo.toml")
SMALL = ("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1")
QUIET = "logging.console=quiet"

Ends = Callable[..., str]
Verb = Callable[..., str]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if weights are read."""

    def read(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", read)


def changed_demo(folder: Path, **changes: Any) -> Path:
    """Return a copy of the demo model with other entries in config.json."""
    shutil.copytree(DEMO, folder)
    return change(folder, **changes)


def change(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **changes}))
    return folder


VERBS = ("train", "sanity", "evaluate", "probe", "doctor")
"""`doctor` is last: it examines some models that the others refuse."""


@pytest.fixture
def refused(ends: Ends, tmp_path: Path, no_weights: None) -> Verb:
    """Run a verb on a model, check that it ends with status 2 and leaves no folder, and return its message."""

    def run(verb: str, model: Path | str, *more: str) -> str:
        subject = {"train": (SMOKE, *SMALL, f"model={model}"), "sanity": (SMOKE, *SMALL, f"model={model}")}
        words = subject.get(verb, (str(model), "task=arithmetic"))
        message = ends(2, verb, *words, QUIET, f"run_dir={tmp_path / 'run'}", *more)
        assert "weights were read" not in message
        assert not (tmp_path / "run").exists()
        return message

    return run


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"model_type": "arcee", "architectures": ["ArceeForCausalLM"]}, "does not know architecture"),
    "activation": ({"hidden_act": "gelu"}, "computes the activations silu and gelu_pytorch_tanh, not 'gelu'"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'dynamic'"),
    "mixers": ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "packed sequences would leak"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "vocabulary": ({"vocab_size": 9}, "its tokenizer has 16"),
    "stop token": ({"eos_token_id": 16}, "stop token 16 (eos_token_id in config.json): its vocabulary has 16 tokens"),
    "context": ({"max_position_embeddings": 24}, "the model's context of 24"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
}

EXAMINED = ("architecture", "activation", "rope", "mixers")
"""Changes that `doctor` examines nevertheless: its census needs no engine (test_doctor_any_decoder.py)."""


@pytest.mark.parametrize(
    ("verb", "changes", "words"),
    [
        pytest.param(verb, *row, id=f"{name}-{verb}")
        for name, row in CHANGES.items()
        for verb in VERBS
        if verb != "doctor" or name not in EXAMINED
    ],
)
def test_what_config_json_tells_is_refused_before_weights_are_read(
    changes: dict[str, Any], words: str, verb: str, refused: Verb, tmp_path: Path
) -> None:
    model = changed_demo(tmp_path / "model", **changes)
    if verb == "probe" and "max_position_embeddings" in changes:
        model = change(model, max_position_embeddings=12)  # it adapts to shorter contexts
        words = "leaves no room in the model's context of 12"
    assert words in refused(verb, model)


@pytest.mark.parametrize("verb", VERBS)
def test_an_island_that_the_model_lacks_is_refused_before_weights_are_read(verb: str, refused: Verb) -> None:
    message = refused(verb, "demo", "precision.fp32_modules=model.layers.3.mlp")
    assert "did you mean model.layers.2.mlp?" in message


@pytest.mark.parametrize("verb", VERBS[:-1])
def test_a_gguf_file_of_another_family_is_refused_by_its_header(
    verb: str, refused: Verb, tmp_path: Path, write_gguf: Callable[..., Path]
) -> None:
    model = write_gguf(tmp_path / "starcoder.gguf", architecture="starcoder2", tensors=False)
    assert "does not know architecture 'starcoder2'" in refused(verb, model)


def test_a_gguf_file_that_transformers_does_not_read_names_the_families(
    refused: Verb, tmp_path: Path, write_gguf: Callable[..., Path]
) -> None:
    message = refused("doctor", write_gguf(tmp_path / "weird.gguf", architecture="weird", tensors=False))
    assert "architecture weird" in message and "use a decoder such as llama" in message
    assert "restore its files" not in message


def test_a_file_that_is_no_gguf_file_says_so(refused: Verb, tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for content in (b"", b"PK" * 40, whole[:1000]):
        (tmp_path / "torn.gguf").write_bytes(content)
        assert "is not a complete GGUF file" in refused("doctor", tmp_path / "torn.gguf")


def test_a_run_is_resumed_and_exported_under_the_same_checks(
    train: Ends, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    train(0, f"model={model}")
    change(model, attention_dropout=0.1, vocab_size=9)

    def read(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", read)
    assert "its tokenizer has 16" in train(2, f"model={model}", "--resume")
    assert "its tokenizer has 16" in ends(2, "export", tmp_path / "run", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


# -- the configuration is checked before the machine


WRONG = {
    "islands": ["precision.fp32_modules=model.layers.1"],
    "name of an island": ["precision.fp32_modules=model.layers.9"],
    "temperature": ["sampling.temperature=0.001"],
    "cache": ["precision.kv_dtype=fp32", "precision.allow_difference=true"],
    "roles": ["precision.rollout_dtype=bf16"],
    "context": ["sampling.max_tokens=120"],
    "data": ["task=math", "task.template=none", "task.path=gone.jsonl"],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
@pytest.mark.parametrize("installed", [True, False])
def test_a_wrong_configuration_is_refused_alike_with_and_without_vllm(
    wrong: list[str], installed: bool, train: Ends, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    find = importlib.util.find_spec
    there = True if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: there if name == "vllm" else find(name, *a))
    message = train(2, "engine.type=vllm", *wrong)
    assert "not installed" not in message and "weights were read" not in message


@pytest.mark.parametrize("verb", ["doctor", "probe"])
def test_what_is_examined_with_vllm_is_refused_before_vllm_is_missed(
    verb: str, refused: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    assert "has no FP32 islands" in refused(verb, "demo", "engine.type=vllm", "precision.fp32_modules=model.layers.1")
    assert "engine.type=vllm needs vLLM" in refused(verb, "demo", "engine.type=vllm")


def test_a_missing_gpu_is_said_after_what_is_wrong_with_the_configuration(train: Ends, no_weights: None) -> None:
    assert "did you mean" in train(2, "device=cuda", "precision.fp32_modules=model.layers.1.mpl")
