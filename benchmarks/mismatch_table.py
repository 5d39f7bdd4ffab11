"""Measure the mismatch at fixed weights, by precision and rounding points: the table of docs/mismatch.md.

    python benchmarks/mismatch_table.py [MODEL] [--prompts 64] [--samples 8]

One rollout for each row, from the native engine at the model's own weights, scored by the trainer at the same weights.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from betterhalf.config.schema import RunConfig
from betterhalf.runs.assembly import assemble
from betterhalf.runs.collect import collect_groups
from betterhalf.runs.measure import measure, mismatch
from betterhalf.runs.progress import Progress
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.weight_sync import sync_weights
from betterhalf.training.pack import pack_step

ROWS = (
    ("FP32", "fp32", "auto"),
    ("FP16, sums in FP32", "fp16", "fp32_sums"),
    ("BF16, the CPU's instructions", "bf16", "native"),
    ("BF16, sums in FP32", "bf16", "fp32_sums"),
)
ROUNDINGS = ("engine", "aligned")


def gap(model: str, precision: str, half_matmul: str, rounding: str, prompts: int, samples: int) -> dict[str, Any]:
    """Return all mismatch metrics of one cell."""
    style = "running_sum" if model == "demo" else "word_problem"
    config = RunConfig.model_validate(
        {
            "model": {"name": model},
            "precision": {"preset": precision, "half_matmul": half_matmul},
            "engine": {"rounding": rounding},
            "task": {"type": "arithmetic", "style": style, "num_prompts": prompts},
            "sampling": {"max_tokens": 64},
            "training": {"prompts_per_step": prompts, "group_size": samples},
        }
    )
    parts = assemble(config)
    try:
        sync_weights(parts)
        collected = collect_groups(parts, Progress(), Stopwatch(parts.precision.device))
        # Advantages do not enter the mismatch.
        batch = pack_step(collected.rollouts, [1.0] * len(collected.rollouts), config, 1)
        return mismatch(batch, measure(parts.trainer, batch, config, 1), config.sampling.max_tokens).metrics
    finally:
        parts.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    print(f"token k3 of {arguments.model}, {arguments.prompts} prompts x {arguments.samples} completions\n")
    print(f"| precision | {' | '.join(f'{r} rounding' for r in ROUNDINGS)} | max abs(pi - mu), engine rounding |")
    print("|---|---|---|---|")
    rows = []
    for label, precision, half_matmul in ROWS:
        cells = {
            r: gap(arguments.model, precision, half_matmul, r, arguments.prompts, arguments.samples) for r in ROUNDINGS
        }
        largest = max(abs(cells["engine"][f"mismatch/prob_gap/{side}"]) for side in ("max", "min"))
        k3 = [cells[r]["mismatch/k3/mean"] for r in ROUNDINGS]
        rows.append({"precision": label, "k3": dict(zip(ROUNDINGS, k3, strict=True)), "max_abs": largest})
        print(f"| {label} | {' | '.join(f'{value:.1e}' for value in k3)} | {largest:.1e} |", flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
