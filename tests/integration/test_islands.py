"""Whole runs with FP32 islands: they train, resume bit for bit, and refuse modules that cannot be islands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs.train import run_training

Configured = Callable[..., RunConfig]
Ends = Callable[..., str]


def trained(config: RunConfig, path: Path) -> RunDir:
    run = RunDir.create(path, resume=False)
    run_training(config, run, resume=False, label="islands")
    return run


def rows_without_times(run: RunDir) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
        for row in read_jsonl(run.metrics)
    ]


@pytest.mark.parametrize("preset", ["fp16", "bf16"])
def test_a_run_with_an_island_trains_under_a_contract_that_names_it(
    small_config: Configured, tmp_path: Path, preset: str
) -> None:
    config = small_config(precision={"preset": preset, "fp32_modules": ["model.layers.1.mlp"]})
    run = trained(config, tmp_path / "run")
    contract = read_json(run.contract)
    rows = {row["region"]: row for row in contract["rows"]}
    assert contract["ok"]
    assert rows["islands"] == {
        "region": "islands",
        "trainer": "model.layers.1.mlp",
        "engine": "model.layers.1.mlp",
        "status": "equal",
    }
    for row in read_jsonl(run.metrics):
        assert row["optim/updates_applied"] == 2
        assert 0 < row["mismatch/k3/mean"] < (1e-6 if preset == "fp16" else 1e-4)


def test_a_run_with_islands_resumes_to_the_same_bits(small_config: Configured, tmp_path: Path) -> None:
    def configured(steps: int) -> RunConfig:
        return small_config(
            precision={"fp32_modules": ["model.layers.1.mlp", "model.layers.2.self_attn"]},
            training={"steps": steps, "checkpoint_every": 1},
            sampling={"max_tokens": 16},
        )

    whole = trained(configured(3), tmp_path / "whole")
    cut = trained(configured(3), tmp_path / "cut")
    _forget_step_3(cut)
    run_training(configured(3), cut, resume=True, label="islands")
    assert rows_without_times(cut) == rows_without_times(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (run.checkpoints / "step-000003" / name for run in (whole, cut))
        assert first.read_bytes() == second.read_bytes()
    assert len(load_file(whole.checkpoints / "step-000003" / "model.safetensors")) == 30


def _forget_step_3(run: RunDir) -> None:
    """Delete the checkpoint of step 3, as if the run had been killed in that step."""
    step_3 = run.checkpoints / "step-000003"
    for file in step_3.iterdir():
        file.unlink()
    step_3.rmdir()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("model.layers.3.mlp", "model.layers.2.mlp"),
        ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
        ("model.layers.1.self_atn", "model.layers.1.self_attn"),
    ],
)
def test_a_module_that_cannot_be_an_island_ends_with_status_2_and_no_folder(
    train: Ends, tmp_path: Path, name: str, meant: str
) -> None:
    message = train(2, f"precision.fp32_modules={name}")
    assert repr(name) in message and f"did you mean {meant}?" in message
    assert not (tmp_path / "run").exists()


def test_an_engine_without_islands_is_refused_before_it_starts(train: Ends, tmp_path: Path) -> None:
    message = train(2, "precision.fp32_modules=model.layers.1", "engine.type=vllm")
    assert "engine.type=vllm" in message and "model.layers.1" in message and "engine.type=native" in message
    assert not (tmp_path / "run").exists()
