"""Synthetic `probe.json` and `doctor.json` with the shape and the size of numbers of real ones."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

from betterhalf.run_dir import RunDir, append_jsonl, write_json_atomic

SIGMA = {"fp16": 3e-3, "bf16": 2.4e-2, "fp32": 3e-6}
"""Standard deviation of the token log-ratio, by the coarser precision of a pair."""
DTYPES = ("fp16", "bf16", "fp32")


def sigma_of(train: str, rollout: str) -> float:
    """Return the standard deviation of a pair; the errors of both sides add up in squares."""
    return math.hypot(SIGMA[train], SIGMA[rollout]) / math.sqrt(2)


def gap_bins(sigma: float, edges: tuple[float, ...], rng: random.Random) -> list[dict[str, float]]:
    """Bins as `GapBin` in JSON, the mismatch falling towards likely tokens."""
    rows = []
    for index, (lower, upper) in enumerate(pairwise(edges)):
        here = sigma * (1.4 - index / len(edges)) * math.exp(rng.gauss(0, 0.15))
        rows.append(
            {
                "lower": lower,
                "upper": upper,
                "tokens": 900 - 100 * index,
                "k3": here**2 / 2,
                "log_ratio_mean": -(here**2) / 2,
                "log_ratio_std": here,
                "prob_gap_mean_abs": here / 3,
            }
        )
    return rows


def pair_row(train: str, rollout: str, completions: int = 64) -> dict[str, Any]:
    """One measured pair."""
    rng, sigma = random.Random(train + rollout), sigma_of(train, rollout)
    k3 = sigma**2 / 2
    lengths = [rng.randint(40, 128) for _ in range(completions)]
    mus = [min(1.0, math.exp(-rng.expovariate(1.2))) for _ in range(1000)]
    metrics = {"k3/mean": k3, "slope_per_1k": -1000 * k3, "prob_gap/max": 3 * sigma, "ess_fraction": 1 - k3}
    return {
        "train": train,
        "rollout": rollout,
        "k3": k3,
        "k3_ci": [0.8 * k3, 1.25 * k3],
        "mean_abs": sigma / 4,
        "max_abs": 3 * sigma,
        "sequence_kl": 90 * k3,
        "slope_per_1k": -1000 * k3,
        "tokens": sum(lengths),
        "seconds": 12.3,
        "metrics": {name: {"value": v, "low": v - abs(v) / 5, "high": v + abs(v) / 5} for name, v in metrics.items()},
        "budget": {
            "sigma2": sigma**2,
            "correlation": 0.07,
            "predicted_ess": math.exp(-100 * sigma**2),
            "observed_ess": math.exp(-90 * sigma**2),
            "max_length": math.log(2) / sigma**2,
        },
        "points": [[mu, min(1.0, mu * math.exp(rng.gauss(0, sigma * (1 - mu) * 2)))] for mu in mus],
        "completions": [[n, rng.gauss(-k3 * n, sigma * math.sqrt(n))] for n in lengths],
        "by_position": gap_bins(sigma, (0, 8, 16, 32, 64, 128), rng),
        "by_probability": gap_bins(sigma, (0, 0.01, 0.1, 0.5, 0.9, 0.99, 1), rng),
    }


LOCALIZE = {
    "dtype": "fp16",
    "first": {"layer": 3, "operation": "mlp.down_proj", "difference": 0.0123, "bound": 0.0021},
    "operations": [
        {"layer": layer, "operation": name, "local": 1e-4 * (layer + 1) * (60 if hit else 1), "bound": 2.1e-3}
        for layer in range(6)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for hit in [layer == 3 and name == "mlp.down_proj"]
    ],
    "growth": [
        {
            "layer": layer,
            "trainer_engine": 2e-4 * 1.5**layer * (20 if layer > 2 else 1),
            "prefill_decode": 1e-4 * 1.2**layer,
            "batch": 0.0,
        }
        for layer in range(6)
    ],
    "comparisons": {
        "trainer_engine": {"first": {"layer": 3, "operation": "mlp.down_proj", "difference": 0.0123, "bound": 0.0021}},
        "prefill_decode": {"first": None},
        "batch": {"first": None},
    },
}

GRADIENT = {
    "rows": [
        {
            "train": train,
            "loss_scale": scale,
            "relative_error": error,
            "cosine": 1 - error**2 / 2,
            "zeroed_fraction": lost,
            "overflow": False,
        }
        for train, scale, error, lost in (
            ("fp16", 65536.0, 0.009, 0.0),
            ("fp16", 1.0, 0.015, 0.057),
            ("bf16", 1.0, 0.08, 0.0),
        )
    ],
    "weights": [
        {"rollout": rollout, "relative_change": change, "cosine": 0.9, "ess_fraction": ess}
        for rollout, change, ess in (("fp16", 0.09, 0.99), ("bf16", 0.47, 0.81))
    ],
    "completions": 16,
    "tokens": 2080,
    "advantages": "signs",
}


def probe_json(dtypes: tuple[str, ...] = DTYPES) -> dict[str, Any]:
    """A whole `probe.json`."""
    pairs = [pair_row(train, rollout) for train in dtypes for rollout in dtypes]
    return {
        "verb": "probe",
        "target": "smollm2",
        "engine": "native",
        "completions": 64,
        "max_tokens": 128,
        "confidence": 0.95,
        "pairs": pairs,
        "bf16_over_fp16": 64.0,
        "seconds": {
            "load": 21.0,
            "generate": dict.fromkeys(dtypes, 31.5),
            "score": dict.fromkeys(dtypes, 9.25),
        },
        "gradient": GRADIENT,
        "localize": LOCALIZE,
        "run_dir": "runs/probe",
    }


def census_rows(layers: int, unsafe: bool) -> list[dict[str, Any]]:
    """A census of a small decoder; an unsafe one overflows in the down projection of layer 3."""
    rng = random.Random(layers)
    names = ["model.embed_tokens"]
    for layer in range(layers):
        names += [f"model.layers.{layer}.{part}" for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    names += ["model.norm", "lm_head"]
    rows = []
    for name in names:
        for kind, size in (("forward", 2**4), ("input", 2**3), ("backward", 2**9), ("weight", 1), ("gradient", 2**8)):
            overflow = unsafe and kind == "forward" and name == "model.layers.3.mlp.down_proj"
            largest = size * math.exp(rng.gauss(0, 0.8)) * (8 if "down" in name else 1)
            rows.append(
                {
                    "module": name,
                    "kind": kind,
                    "max_abs": None if overflow else largest,
                    "headroom_bits": None if overflow else math.log2(65504 / largest),
                    "subnormal_fraction": 0.01 * rng.random(),
                    "zero_fraction": 0.002 * rng.random(),
                    "finite": not overflow,
                }
            )
    return rows


def doctor_json(unsafe: bool = False) -> dict[str, Any]:
    """A whole `doctor.json`."""
    module = "model.layers.3.mlp.down_proj"
    fp16 = {"verdict": "ok", "reasons": ["least headroom 3.1 bits; k3 3.9e-06 in its band"], "modules": []}
    if unsafe:
        fp16 = {"verdict": "unsafe", "reasons": ["1 forward value is not finite"], "modules": [module]}
    return {
        "verb": "doctor",
        "target": "smollm2",
        "verdicts": {
            "fp16": fp16,
            "bf16": {"verdict": "watch", "reasons": ["k3 of 2.9e-04 is 64 times that of FP16"], "modules": []},
            "fp32": {"verdict": "ok", "reasons": ["k3 below 1e-10"], "modules": []},
        },
        "recommended": "bf16" if unsafe else "fp16",
        "config": '[model]\nname = "smollm2"\n\n[precision]\npreset = "fp16"\n',
        "census": {
            "fp16": {
                "modules": census_rows(12, unsafe),
                "largest_safe_loss_scale": 2.0**18,
                "loss_scale": 65536.0,
                "zeroed_fraction": 0.0004,
                "zeroed_fraction_unscaled": 0.057,
            }
        },
        "islands": {"modules": [module], "cures": True, "reason": "every forward value is finite with it"}
        if unsafe
        else None,
        "mismatch": [pair_row(train, rollout, 16) for train in DTYPES for rollout in DTYPES],
        "engine_agrees": {"agrees": True, "reason": "k3 of the FP32 pair is 4.5e-12"},
        "seconds": 41.0,
        "run_dir": "runs/doctor",
    }


def fill_study(path: Path, file: str, result: dict[str, Any]) -> RunDir:
    """Write a folder of `probe` or `doctor`."""
    run = RunDir(path)
    path.mkdir(parents=True)
    write_json_atomic(run.config, {"model": {"name": "smollm2"}, "engine": {"type": "native"}, "seed": 0})
    write_json_atomic(run.environment, {"cpu": "Example CPU", "cores": 2, "python": "3.11.4"})
    write_json_atomic(path / file, result)
    return run


def add_mismatch(run: RunDir, precision: str, steps: int) -> None:
    """Write `mismatch.jsonl`, `watchdog.jsonl` beside a run's metrics."""
    rng, sigma = random.Random(precision), SIGMA[precision]
    for step in range(1, steps + 1):
        lengths = [rng.randint(20, 40) for _ in range(32)]
        row = {
            "step": step,
            "by_probability": gap_bins(sigma, (0, 0.01, 0.1, 0.5, 0.9, 0.99, 1), rng),
            "by_position": gap_bins(sigma, (0, 8, 16, 32, 64), rng),
            "completions": [[n, rng.gauss(-n * sigma**2 / 2, sigma * math.sqrt(n))] for n in lengths],
        }
        append_jsonl(run.path / "mismatch.jsonl", row)
    if precision == "bf16":
        for step in (20, 21, 22, 40):
            append_jsonl(run.path / "watchdog.jsonl", watchdog_row(step))


def watchdog_row(step: int) -> dict[str, Any]:
    """One event of the watchdog."""
    return {
        "step": step,
        "metric": "budget/predicted_ess",
        "value": 0.41,
        "bound": 0.5,
        "action": "warn",
        "reason": "the effective sample size predicted at this length is below 0.5",
    }
