"""Compare the scores of trainer and engine for the tokens of the weight sync's check, by engine and precision.

OMP_NUM_THREADS=1 python benchmarks/score_check.py [demo|smollm2] [native,vllm] [fp16,bf16,fp32]
"""

from __future__ import annotations

import sys

from betterhalf.config.load import load_config
from betterhalf.runs.assembly import assemble
from betterhalf.runs.score_check import score_difference, tolerance
from betterhalf.runs.weight_sync import sync_weights


def main() -> None:
    name, engines, dtypes = [*sys.argv[1:], *("demo", "native,vllm", "fp16,bf16,fp32")[len(sys.argv) - 1 :]]
    print("| model | engine | precision | mean difference | bound | mean logprob |")
    print("|---|---|---|---|---|---|")
    for engine in engines.split(","):
        for dtype in dtypes.split(","):
            parts = assemble(load_config(None, [f"model={name}", f"engine={engine}", f"precision={dtype}"]))
            try:
                sync_weights(parts)
                difference, mean = score_difference(parts.trainer, parts.engine, parts.model)
                bound = tolerance(parts.precision, mean)
                print(f"| {name} | {engine} | {dtype} | {difference:.2g} | {bound:.2g} | {mean:.1f} |", flush=True)
            finally:
                parts.close()


if __name__ == "__main__":
    main()
