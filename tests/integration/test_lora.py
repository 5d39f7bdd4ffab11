"""A run with LoRA adapters from start to export: every verb that takes a run takes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs.export import export

pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")

Ends = Callable[..., str]

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke" / "demo.toml"
SMALL = (
    *("training.steps=2", "training.prompts_per_step=4", "training.group_size=4", "training.optimizer_steps=2"),
    *("training.checkpoint_every=1", "optimizer.learning_rate=2e-3", "logging.console=quiet"),
    *("lora.rank=4", "algorithm.kl.coefficient=0.01"),
)


def run_of(ends: Ends, folder: Path, *more: str) -> RunDir:
    ends(0, "train", SMOKE, *SMALL, *more, f"run_dir={folder}")
    return RunDir(folder)


def rows(run: RunDir) -> list[dict[str, object]]:
    same = ("time/", "system/")
    return [{k: v for k, v in row.items() if not k.startswith(same)} for row in read_jsonl(run.metrics)]


def test_a_resumed_run_is_the_same_bit_for_bit(ends: Ends, tmp_path: Path) -> None:
    whole = run_of(ends, tmp_path / "whole")
    (first, second) = rows(whole)
    assert first["mismatch/lost_update_fraction"] is None, "adapters start at 0"
    assert 0 < float(str(second["mismatch/lost_update_fraction"])) < 1
    cut = RunDir(shutil.copytree(whole.path, tmp_path / "cut"))
    shutil.rmtree(cut.checkpoints / "step-000002")
    ends(0, "train", SMOKE, *SMALL, f"run_dir={cut.path}", "--resume")
    assert rows(cut) == rows(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (run.checkpoints / "step-000002" / name for run in (cut, whole))
        assert mine.read_bytes() == theirs.read_bytes()
    saved = load_file(whole.checkpoints / "step-000002" / "model.safetensors")
    assert all(".lora_" in name for name in saved), "a checkpoint holds only what is trained"


def test_the_adapter_and_the_merged_model_are_exported(ends: Ends, tmp_path: Path) -> None:
    from peft import PeftModel

    run = run_of(ends, tmp_path / "run")
    ends(0, "export", run.path, tmp_path / "adapter")
    in_adapter = export(str(run.path), str(tmp_path / "again"))["parameters"]
    in_whole = export(str(run.path), str(tmp_path / "merged"), merge=True)["parameters"]
    saved = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert in_adapter == sum(value.numel() for value in saved.values())
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 4
    assert written["target_modules"] == sorted(written["target_modules"]), "equal runs give equal files"
    base = AutoModelForCausalLM.from_pretrained(written["base_model_name_or_path"], dtype=torch.float32)
    ids = torch.arange(12)[None]
    plain = base(ids).logits.detach()
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(ids).logits.detach()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert in_whole == sum(parameter.numel() for parameter in whole.parameters())
    merged = whole(ids).logits.detach()
    assert (adapted - merged).abs().max() < 0.1 * (adapted - plain).abs().max(), "the rounding to FP16 remains"


@pytest.mark.parametrize("merge", ["weights", "adapter"])
def test_a_run_is_evaluated_with_its_adapter(merge: str, ends: Ends, tmp_path: Path) -> None:
    run = run_of(ends, tmp_path / "run", f"lora.merge={merge}")
    ends(0, "evaluate", run.path, f"run_dir={tmp_path / 'evaluation'}", "evaluate.samples=1", "evaluate.max_prompts=8")
    found = json.loads((tmp_path / "evaluation" / "contract.json").read_text())
    (row,) = (row for row in found["rows"] if row["region"] == "lora")
    assert ("unmerged" in row["trainer"]) == (merge == "adapter") and found["ok"]


def test_bad_input_ends_with_the_fix(ends: Ends, tmp_path: Path) -> None:
    for settings, words in (
        (("lora.rank=4", 'lora.target_modules=["qproj"]'), "did you mean q_proj"),
        (("lora.rank=129",), "set lora.rank=128 or less"),
        (("lora.alpha=4",), "lora.rank=0 trains all weights"),
    ):
        said = ends(2, "train", SMOKE, *settings, f"run_dir={tmp_path / 'run'}")
        assert words in said and not (tmp_path / "run").exists()
