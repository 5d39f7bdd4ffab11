"""Time vLLM in a run on this machine: start, generation, weight sync and its verification, by precision and head.

    OMP_NUM_THREADS=1 python benchmarks/vllm_engine.py [demo|smollm2] [fp16,bf16,fp32]

A CPU run of SmolLM2 takes about five minutes. The script prints one row for each engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from betterhalf.config.schema import ModelConfig, PrecisionConfig, SamplingConfig, VllmEngineConfig
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.runs.score_check import fixed_tokens
from betterhalf.types import GenerateRequest

SEQUENCES, TOKENS = 16, 48


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(model: LoadedModel, dtype: str, head: str) -> str:
    precision = build_precision(PrecisionConfig.model_validate({"preset": dtype}), torch.device("cpu"))
    config = VllmEngineConfig.model_validate({"head_dtype": head})
    # No stop token: every completion has its full length.
    engine = VllmEngine(model.hf_config, precision=precision, config=config, stop_token_ids=())
    weights = [(name, p.detach().to(precision.wire_dtype)) for name, p in model.module.named_parameters()]
    vocabulary = model.hf_config.vocab_size
    prompts = [tuple((7 * i + j) % vocabulary for j in range(24)) for i in range(SEQUENCES)]
    requests = [GenerateRequest(token_ids=ids, group_size=1, key=(0, 1, i)) for i, ids in enumerate(prompts)]
    try:
        first = seconds(lambda: engine.load_weights(weights, policy_version=0))
        sync = min(seconds(lambda: engine.load_weights(weights, policy_version=0)) for _ in range(3))
        verify = min(seconds(lambda: engine.report()) for _ in range(3))
        assert engine.report().digests == weights_digests(weights)
        score = min(seconds(lambda: engine.score([fixed_tokens(vocabulary, 32)])) for _ in range(3))
        engine.generate(requests[:1], SamplingConfig(max_tokens=2))
        generate = min(seconds(lambda: engine.generate(requests, SamplingConfig(max_tokens=TOKENS))) for _ in range(2))
    finally:
        engine.close()
    speed = SEQUENCES * TOKENS / generate
    return f"| {dtype} | {head} | {first - sync:.1f} | {speed:.0f} | {sync:.2f} | {verify:.2f} | {score:.2f} |"


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    dtypes = sys.argv[2].split(",") if len(sys.argv) > 2 else ["fp16", "bf16", "fp32"]
    model = load_model(ModelConfig(name=name))
    print(f"{name}: {SEQUENCES} sequences of {TOKENS} tokens; {torch.get_num_threads()} thread(s)")
    print("| precision | head | start s | tokens/s | weight sync s | read back s | score s |")
    print("|---|---|---|---|---|---|---|")
    for dtype in dtypes:
        for head in ("fp32", "model") if dtype != "fp32" else ("fp32",):
            print(measure(model, dtype, head), flush=True)


if __name__ == "__main__":
    main()
