"""Whole runs of a mixture of experts: both engines, three formats, replay, export, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.conftest import SMOKE, Ends
from transformers import AutoModelForCausalLM

from betterhalf import cli
from betterhalf.run_dir import RunDir

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo_model.py"
STEPS = (
    *("training.steps=3", "training.prompts_per_step=2", "training.group_size=3", "training.optimizer_steps=1"),
    *("task.terms=5", "sampling.max_tokens=20", "logging.console=quiet"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the untrained model of `make_demo_model.py --model demo-moe`."""
    spec = importlib.util.spec_from_file_location("make_demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    # The dataclass decorator looks up its module by name.
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    recipe, path = script.RECIPES["demo-moe"], tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    script.save(script.Qwen3MoeForCausalLM(script.make_config(recipe)), recipe, path)
    return path


def train(folder: Path, run: Path, *words: str) -> list[dict[str, Any]]:
    """Train three steps, and return the rows of the run's metrics."""
    found = cli.main(["train", SMOKE, f"model={folder}", f"run_dir={run}", *STEPS, *words])
    assert found == 0
    return [json.loads(line) for line in RunDir.open(str(run)).metrics.read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_three_steps_with_the_native_engine(precision: str, folder: Path, tmp_path: Path) -> None:
    rows = train(folder, tmp_path / "run", f"precision={precision}")
    assert len(rows) == 3
    for row in rows:
        assert 0 <= row["experts/change_fraction/mean"] <= row["experts/change_fraction/max_layer"] <= 1
        assert row["experts/load/max"] >= row["experts/load/mean"] >= 1
        assert math.isfinite(row["optim/grad_norm"])
    if precision == "fp32":
        assert all(row["mismatch/k3/mean"] < 1e-9 and row["experts/change_fraction/any_layer"] == 0 for row in rows)


@pytest.mark.extra
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_three_steps_with_vllm_and_replay(precision: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    words = ("engine=vllm", f"precision={precision}", "algorithm.routing_replay=true")
    rows = train(folder, tmp_path / "run", *words)
    assert len(rows) == 3
    contract = json.loads((tmp_path / "run" / "contract.json").read_text())
    (router,) = [row for row in contract["rows"] if row["region"] == "router"]
    assert router["engine"] == "fp32"
    if precision == "fp32":
        assert all(row["mismatch/k3/mean"] < 1e-9 and row["experts/change_fraction/any_layer"] == 0 for row in rows)


def test_replay_trains_and_the_exported_folder_loads(folder: Path, tmp_path: Path) -> None:
    rows = train(folder, tmp_path / "run", "precision=bf16", "algorithm.routing_replay=true")
    assert rows[-1]["policy/version"] == 3
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    module: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    changed = {
        name
        for (name, one), two in zip(module.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"} <= changed


def test_exact_rounding_leaves_no_mismatch_and_no_change_of_experts(folder: Path, tmp_path: Path) -> None:
    rows = train(folder, tmp_path / "run", "precision=fp16", "engine.rounding=exact")
    assert all(row["mismatch/log_ratio/max_abs"] == row["experts/change_fraction/any_layer"] == 0 for row in rows)


def test_replay_is_refused_where_the_engine_does_not_report_experts(ends: Ends, folder: Path, tmp_path: Path) -> None:
    words = ("algorithm.routing_replay=true", "engine=vllm", "engine.compile=true", f"run_dir={tmp_path / 'run'}")
    message = ends(2, "train", SMOKE, f"model={folder}", "logging.console=quiet", *words)
    assert "which engine.type=vllm does not report; set engine=native" in message
    assert not (tmp_path / "run").exists()


def test_replay_is_refused_without_experts(ends: Ends, tmp_path: Path) -> None:
    words = ("algorithm.routing_replay=true", "logging.console=quiet", f"run_dir={tmp_path / 'run'}")
    message = ends(2, "train", SMOKE, *words)
    assert "model 'demo' (llama) has none; set algorithm.routing_replay=false" in message
    assert not (tmp_path / "run").exists()


def test_the_doctor_examines_experts(folder: Path, tmp_path: Path) -> None:
    words = ("task.terms=5", "sampling.max_tokens=20", "probe.prompts=2", "logging.console=quiet")
    assert cli.main(["doctor", str(folder), "precision.pairs=fp16/fp16", *words, f"run_dir={tmp_path / 'run'}"]) == 0
    text = (tmp_path / "run" / "doctor.json").read_text()
    assert "model.layers.0.mlp.experts" in text
