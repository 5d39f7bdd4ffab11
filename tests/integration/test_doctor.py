"""`betterhalf doctor` from the command line, on a healthy model and on models made unsafe in different ways."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from betterhalf import cli
from betterhalf.config.load import load_config
from betterhalf.config.schema import ModelConfig, RunConfig
from betterhalf.errors import ConfigError, EngineError, InputError
from betterhalf.examine import doctor as doctor_module
from betterhalf.examine.doctor import doctor
from betterhalf.models.loading import load_model
from betterhalf.rollout.native.engine import NativeEngine

BLOCK = "model.layers.1"
Change = Callable[[Any], None]
Examine = Callable[..., dict[str, Any]]

SMALL: dict[str, Any] = {
    "task": {"type": "arithmetic", "num_prompts": 8},
    "doctor": {"prompts": 2, "group_size": 2, "max_tokens": 24},
    "probe": {"bootstrap": 20},
    "logging": {"console": "quiet"},
}


@pytest.fixture
def examine(tmp_path: Path) -> Examine:
    """Run the doctor on the demo model, or on one with the MLP of its second block changed, and return the result."""

    def run(change: Change | None = None, **config: Any) -> dict[str, Any]:
        target = "demo" if change is None else str(changed_model(tmp_path / "model", change))
        return doctor(target, RunConfig.model_validate({**SMALL, **config}), str(tmp_path / "run"))

    return run


def changed_model(path: Path, change: Change) -> Path:
    model = load_model(ModelConfig(name="demo"))
    with torch.no_grad():
        change(model.module.get_submodule(f"{BLOCK}.mlp"))
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def large_output(mlp: Any) -> None:
    mlp.down_proj.weight.mul_(2e4)


def large_product(mlp: Any) -> None:
    mlp.gate_proj.weight.mul_(300)
    mlp.up_proj.weight.mul_(300)
    mlp.down_proj.weight.mul_(1e-4)


def large_gradient(mlp: Any) -> None:
    """Give the up projection's row 7 a large gradient, but make it zero, so that unit 7 contributes nothing."""
    mlp.up_proj.weight[7] = 0
    mlp.gate_proj.weight[7].mul_(1e4)
    mlp.down_proj.weight[:, 7] = mlp.down_proj.weight[:, 7].sign() * 5e4


def test_a_healthy_model_is_safe_in_fp16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    started = time.process_time()
    assert cli.main(["doctor", "demo", "--json", "logging.console=quiet", f"run_dir={run}"]) == 0
    assert time.process_time() - started < 60
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed.keys() == {"verdicts", "recommended", "run_dir"}
    assert {name: verdict["verdict"] for name, verdict in printed["verdicts"].items()}["fp16"] == "ok"
    assert printed["recommended"] == "fp16"
    names = {"config.json", "environment.json", "doctor.json", "summary.json", "report.html"}
    assert names <= {file.name for file in run.iterdir()}
    found = json.loads((run / "doctor.json").read_text())
    assert found["engine_agrees"]["agrees"] and found["islands"] is None
    assert [pair["train"] for pair in found["mismatch"]] == ["fp32", "fp16", "bf16"]
    assert found["census"]["fp16"]["largest_safe_loss_scale"] > 2**16
    pasted = tmp_path / "recommended.toml"
    pasted.write_text(found["config"])
    assert load_config(pasted).precision.preset == "fp16"


def test_the_terminal_shows_verdicts_headroom_and_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "demo", "logging.console=quiet", f"run_dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "fp16  ok" in out and "Least headroom in fp16" in out and "fp16/fp16" in out
    assert 'preset = "fp16"' in out and str(tmp_path / "run") in out


@pytest.mark.parametrize(
    ("change", "spot", "islands"),
    [
        (large_output, "the output of model.layers.1.mlp.down_proj", [f"{BLOCK}.mlp.down_proj"]),
        (large_product, "the input of model.layers.1.mlp.down_proj", [f"{BLOCK}.mlp"]),
    ],
)
def test_a_forward_overflow_is_unsafe_named_and_fixed_by_islands(
    examine: Examine, change: Change, spot: str, islands: list[str]
) -> None:
    result = examine(change)
    fp16 = result["verdicts"]["fp16"]
    assert fp16["verdict"] == "unsafe"
    assert fp16["modules"] == [f"{BLOCK}.mlp.down_proj"]
    assert fp16["reasons"][0].startswith(f"In the forward pass, {spot}")
    assert result["verdicts"]["fp32"]["verdict"] == "ok"
    assert result["islands"]["cures"] and result["islands"]["modules"] == islands
    assert result["recommended"] == "fp16"
    assert result["passed"] is False
    assert f'fp32_modules = ["{islands[0]}"]' in result["config"]


def test_the_recommended_islands_pass_the_doctor(examine: Examine, tmp_path: Path) -> None:
    first = examine(large_output)
    pasted = tmp_path / "recommended.toml"
    pasted.write_text(first["config"])
    config = load_config(pasted).model_dump()
    again = doctor(first["target"], RunConfig.model_validate({**config, **SMALL}), str(tmp_path / "again"))
    assert again["verdicts"]["fp16"]["verdict"] == "ok"
    assert again["islands"] is None and again["passed"] is True


def test_a_backward_overflow_alone_is_unsafe_and_named(examine: Examine) -> None:
    result = examine(large_gradient)
    fp16 = result["verdicts"]["fp16"]
    assert fp16["verdict"] == "unsafe"
    assert fp16["modules"][0] == f"{BLOCK}.mlp.up_proj"
    assert fp16["reasons"][0].startswith("In the backward pass") and "no loss scale" in fp16["reasons"][0]
    assert result["census"]["fp16"]["largest_safe_loss_scale"] < 1
    assert all(row["finite"] for row in result["census"]["fp16"]["modules"] if row["kind"] in ("forward", "input"))
    assert result["islands"]["cures"] and result["islands"]["modules"] == [f"{BLOCK}.mlp"]


def test_an_engine_with_other_weights_is_a_bug(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = NativeEngine.generate

    def perturbed(self: NativeEngine, *arguments: Any) -> Any:
        held = dict(self._weights.narrowed())
        held["model.layers.0.self_attn.v_proj.weight"] = 1.05 * held["model.layers.0.self_attn.v_proj.weight"]
        self._weights.load(held.items())
        return generate(self, *arguments)

    monkeypatch.setattr(NativeEngine, "generate", perturbed)
    result = examine()
    assert result["engine_agrees"]["agrees"] is False
    assert "BUG" in result["engine_agrees"]["reason"] and "--localize" in result["engine_agrees"]["reason"]
    assert result["passed"] is False


def test_an_engine_that_never_samples_leaves_the_census(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: NativeEngine, *_: Any) -> Any:
        raise EngineError("the engine is out of order; repair it")

    monkeypatch.setattr(NativeEngine, "generate", fails)
    result = examine()
    assert result["census"]["fp16"]["largest_safe_loss_scale"] > 1
    assert "out of order" in result["verdicts"]["fp16"]["reasons"][0]
    assert result["verdicts"]["fp16"]["verdict"] == "unsafe"


def test_bad_input_leaves_no_folder(examine: Examine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="matches no module"):
        examine(precision={"fp32_modules": ["model.layers.9"]})
    assert not (tmp_path / "run").exists()
    examine()
    assert (tmp_path / "run" / "config.json").is_file()


def test_a_missing_loss_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"algorithm": {"loss": "missing_file.py:loss"}})
    with pytest.raises(ConfigError, match=r"algorithm\.loss: the file missing_file\.py does not exist"):
        doctor("demo", config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_was_measured_is_on_disk_when_something_fails_later(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any) -> Any:
        raise EngineError("gone")

    monkeypatch.setattr(doctor_module, "score_pairs", fails)
    with pytest.raises(EngineError, match="gone"):
        examine()
    found = json.loads((tmp_path / "run" / "doctor.json").read_text())
    assert found["census"].keys() == {"fp16", "bf16", "fp32"}
    assert found["verdicts"] == {} and found["recommended"] is None
    assert (tmp_path / "run" / "rollouts-fp16.jsonl").is_file()
