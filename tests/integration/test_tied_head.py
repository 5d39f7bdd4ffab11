"""If config.json and the weights disagree about a tied head, trainer, engine and export follow the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from betterhalf.models import loading

DEMO = Path(loading.__file__).parent / "demo"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Ends = Callable[..., str]
Change = Callable[[dict[str, torch.Tensor]], object]


def demo_that_says(folder: Path, *, tied: bool, change: Change = lambda weights: None) -> Path:
    shutil.copytree(DEMO, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"tie_word_embeddings": tied}))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_untied_head_is_trained_sampled_with_and_exported_whatever_config_json_says(
    train: Ends, ends: Ends, tmp_path: Path
) -> None:
    """The demo's head differs from its embedding; the run equals that of a folder whose config.json says so."""
    model = demo_that_says(tmp_path / "model", tied=True)
    said = train(0, f"model={model}", "logging.console=lines")
    assert "config.json" in said and "tie_word_embeddings=true" in said and "differs from the embedding" in said
    train(0, f"run_dir={tmp_path / 'untied'}")
    first, second = (
        load_file(tmp_path / run / "checkpoints" / "step-000001" / "model.safetensors") for run in ("run", "untied")
    )
    assert first.keys() == second.keys() and HEAD in first
    assert all(torch.equal(first[name], second[name]) for name in first)

    ends(0, "export", tmp_path / "run", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["tie_word_embeddings"] is False
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float16)
    assert torch.equal(exported.lm_head.weight, first[HEAD].half())
    assert torch.equal(exported.model.embed_tokens.weight, first[EMBEDDING].half())


def test_a_copy_of_the_embedding_in_the_file_stays_tied(train: Ends, ends: Ends, tmp_path: Path) -> None:
    def copy_head(weights: dict[str, torch.Tensor]) -> None:
        weights[HEAD] = weights[EMBEDDING].clone()

    model = demo_that_says(tmp_path / "model", tied=True, change=copy_head)
    assert "tie_word_embeddings" not in train(0, f"model={model}", "logging.console=lines")
    assert HEAD not in load_file(tmp_path / "run" / "checkpoints" / "step-000001" / "model.safetensors")
    ends(0, "export", tmp_path / "run", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("verb", ["evaluate", "probe", "doctor"])
def test_a_model_without_a_head_that_is_not_said_to_be_tied_names_the_key(
    verb: str, ends: Ends, tmp_path: Path
) -> None:
    model = demo_that_says(tmp_path / "model", tied=False, change=lambda weights: weights.pop(HEAD))
    message = ends(2, verb, model, "task=arithmetic", f"run_dir={tmp_path / 'run'}")
    assert "has no lm_head.weight" in message and "set tie_word_embeddings to true" in message
