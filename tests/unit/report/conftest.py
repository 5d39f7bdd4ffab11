"""Synthetic run folders with files and numbers like those of real ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.run_dir import RunDir, append_jsonl, write_json_atomic

MakeRun = Callable[..., RunDir]

K3 = {"fp16": 5e-8, "bf16": 4e-6, "fp32": 1e-13, "e8m2": 1e-2}
GAP = {"fp16": 8e-4, "bf16": 9e-3, "fp32": 1e-6, "e8m2": 0.5}


def metrics_row(step: int, precision: str, rng: random.Random) -> dict[str, Any]:
    """One step of a run that learns, with one overflow at step 9 in FP16."""
    grown = 1 - math.exp(-step / 18)
    scaled = precision == "fp16"
    return {
        "step": step,
        "rollout/reward/mean": min(1.0, 0.6 + 0.36 * grown + rng.gauss(0, 0.025)),
        "rollout/length/mean": 34.8 + rng.gauss(0, 0.15),
        "mismatch/k3/mean": K3[precision] * math.exp(rng.gauss(0, 0.3)) * (1 + grown),
        "mismatch/prob_gap/max": GAP[precision] * (0.5 + rng.random()),
        "mismatch/prob_gap/min": -GAP[precision] * (0.5 + rng.random()),
        "mismatch/ess_fraction": 1 - K3[precision] * 100,
        "mismatch/slope_per_1k": rng.gauss(0, 300 * math.sqrt(K3[precision])),
        "mismatch/accident_fraction": 2e-4 * rng.randrange(2) if precision == "bf16" else 0.0,
        "mismatch/accident_fraction_above": 0.0,
        "budget/predicted_ess": math.exp(-K3[precision] * 70 * step * 30),
        "budget/observed_ess": math.exp(-K3[precision] * 70 * step * 24 * (1 + rng.random() / 3)),
        "budget/max_length": 0.35 / K3[precision],
        "rollout/engine_restarts": 0.0,
        "optim/loss_scale": (65536.0 if step < 9 else 32768.0) if scaled else 1.0,
        "optim/skipped": 1.0 if scaled and step == 9 else 0.0,
        "optim/grad_norm": 0.4 * math.exp(rng.gauss(0, 0.25)),
        "optim/token_share/max": 0.3 + 0.5 * rng.random(),
        "policy/ratio/max_negative": math.exp(abs(rng.gauss(0, 1))),
        "policy/entropy/mean": 0.32 * math.exp(-step / 60) + rng.gauss(0, 0.004),
        "time/step_seconds": 1.31,
        "time/generate_seconds": 0.4,
        "time/reward_seconds": 0.01,
        "time/measure_seconds": 0.27,
        "time/train_seconds": 0.57,
        "time/sync_seconds": 0.04,
    }


def rollout_row(step: int, precision: str, rng: random.Random) -> dict[str, Any]:
    """One rollout of the running-sum task, with text tokens."""
    tokens = list("7=09,9=18,1=19,5=24,5=29,4=33,9=42.")
    behavior = [-abs(rng.expovariate(3)) for _ in tokens]
    noise = math.sqrt(2 * K3[precision])
    return {
        "step": step,
        "prompt": "2+7+9+1+5+5+4+9=",
        "completion": "".join(tokens),
        "reward": float(rng.random() < 0.8),
        "tokens": tokens,
        "behavior_logprobs": behavior,
        "trainer_logprobs": [min(0.0, value + rng.gauss(0, noise)) for value in behavior],
    }


def config(precision: str, steps: int) -> dict[str, Any]:
    """Return a shortened resolved configuration."""
    return {
        "name": "demo",
        "seed": 0,
        "model": {"name": "demo"},
        "precision": {"preset": precision, "loss_scale": {"initial": 65536.0}},
        "task": {"type": "arithmetic"},
        "algorithm": {"preset": "grpo"},
        "optimizer": {"learning_rate": 1e-4},
        "training": {"steps": steps, "prompts_per_step": 32, "group_size": 8},
    }


def contract(precision: str) -> dict[str, Any]:
    """Contract of two sides that agree on everything but attention, which is only reported."""
    same = ("weights", "compute", "wire", "kv", "lm_head", "norm")
    rows = [{"region": region, "trainer": precision, "engine": precision, "status": "equal"} for region in same]
    return {"rows": [*rows, {"region": "attention", "trainer": "sdpa", "engine": "native", "status": "reported"}]}


ENVIRONMENT = {
    "time": "2026-01-02T03:04:05+00:00",
    "python": "3.11.4",
    "cpu": "Example CPU @ 2.5GHz",
    "cores": 2,
    "memory_gib": 7.8,
    "gpus": [],
    "packages": {"betterhalf": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"},
    "git": {"commit": "0123456789abcdef", "dirty": True},
}


def fill_run(path: Path, precision: str = "fp16", *, steps: int = 65, seed: int = 0) -> RunDir:
    """Write a whole train run below `path`."""
    run, rng = RunDir.create(path, resume=False), random.Random(f"{precision}{seed}")
    write_json_atomic(run.config, config(precision, steps))
    write_json_atomic(run.environment, ENVIRONMENT)
    write_json_atomic(run.contract, contract(precision))
    for step in range(1, steps + 1):
        append_jsonl(run.metrics, metrics_row(step, precision, rng))
        append_jsonl(run.rollouts, rollout_row(step, precision, rng))
    return run


SUMMARY = {
    "passed": True,
    "k3_ratio": 79.6,
    "arms": {
        "fp16": {
            "passed": True,
            "final_accuracy": 0.9731,
            "first_reward": 0.6,
            "final_reward": 0.9712,
            "verdict": "learned",
            "changes": {"precision.preset": "fp16"},
            "mismatch_k3": 5.02e-8,
            "mismatch_max_abs": 1.19e-3,
            "skipped_steps": 1,
            "seconds": 85.2,
        },
        "bf16": {
            "passed": True,
            "final_accuracy": 0.9689,
            "first_reward": 0.6,
            "final_reward": 0.9655,
            "verdict": "learned",
            "changes": {"precision.preset": "bf16"},
            "mismatch_k3": 4.0e-6,
            "mismatch_max_abs": 1.33e-2,
            "skipped_steps": 0,
            "seconds": 86.9,
        },
    },
}


COLLAPSE = {
    "fp16": (0.97, "learned", 4e-7, {"precision.preset": "fp16"}),
    "bf16": (0.96, "learned", 2e-5, {"precision.preset": "bf16"}),
    "e8m2": (0.0, "collapsed", 0.25, {"precision.preset": "e8m2"}),
    "e8m2_aligned": (0.86, "learned", 2e-8, {"precision.preset": "e8m2", "engine.rounding": "aligned"}),
    "dual_clip": (0.7, "damaged", 0.07, {"precision.preset": "e8m2", "algorithm.surrogate.dual_clip": 3.0}),
    "coarse_trainer": (0.01, "collapsed", 0.3, {"precision.preset": "fp32", "precision.compute_dtype": "e8m2"}),
    "coarse_engine": (0.87, "learned", 0.03, {"precision.preset": "fp32", "precision.rollout_dtype": "e8m2"}),
}
"""Final reward, verdict, k3 and changes of seven arms."""


def collapse_summary() -> dict[str, Any]:
    """Return the summary of a run of seven arms, of which two collapse."""
    arms = {
        name: {
            "passed": reward > 0.9,
            "final_accuracy": reward,
            "first_reward": 0.6,
            "final_reward": reward,
            "verdict": verdict,
            "mismatch_k3": k3,
            "changes": changes,
        }
        for name, (reward, verdict, k3, changes) in COLLAPSE.items()
    }
    return {"passed": True, "k3_ratio": 50.0, "arms": arms}


def fill_sanity(path: Path, arms: tuple[str, ...] = ("fp16", "bf16"), *, steps: int = 65) -> RunDir:
    """Write a sanity run with its arms below `path`."""
    run = RunDir.create(path, resume=False)
    for name in arms:
        fill_run(run.arm(name).path, name, steps=steps)
    write_json_atomic(run.environment, ENVIRONMENT)
    write_json_atomic(run.config, config("fp16", steps))
    write_json_atomic(run.summary, SUMMARY)
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Factory of train runs, each in a fresh folder."""
    return lambda name="run", precision="fp16", **sizes: fill_run(tmp_path / name, precision, **sizes)


@pytest.fixture
def make_sanity(tmp_path: Path) -> MakeRun:
    """Factory of sanity runs, each in a fresh folder."""
    return lambda name="sanity", **sizes: fill_sanity(tmp_path / name, **sizes)


@pytest.fixture
def summary() -> dict[str, Any]:
    """The summary of the sanity run."""
    return SUMMARY
