"""Rules for prime-rl, read from commit 559b44772."""

from __future__ import annotations

from betterhalf.integrations.audit.records import (
    Decided,
    Fixed,
    Framework,
    FromKey,
    Is,
    Like,
    Recipe,
    Rule,
    Trap,
)
from betterhalf.integrations.audit.words import AUTO_ENGINE, AUTO_KV, CHECKPOINT

_MODEL = "src/prime_rl/trainer/model.py:824"
_TRAINER = "packages/prime-rl-configs/src/prime_rl/configs/trainer.py"
_INFERENCE = "packages/prime-rl-configs/src/prime_rl/configs/inference.py"
_HALF_ONLY = {"fp16": "prime-rl takes bfloat16 or float32", "fp8": "prime-rl takes bfloat16 or float32"}

FRAMEWORK = Framework(
    name="prime-rl",
    title="prime-rl",
    versions=("559b44772",),
    repository="https://github.com/PrimeIntellect-ai/prime-rl",
    kinds=("toml",),
    marks=("orchestrator.*", "inference.*", "trainer.model.*", "trainer.optim.*", "trainer.loss.*"),
    rules=(
        Rule(
            "compute",
            Fixed("fp8"),
            "linear layers are quantised in training",
            f"{_TRAINER}:248",
            (Is("trainer.model.quantization.type", ("*fp8",)),),
        ),
        Rule("compute", Fixed("bf16"), "FSDP's param_dtype is fixed in the code", _MODEL),
        Rule(
            "masters",
            FromKey("trainer.model.optimization_dtype", Fixed("fp32"), refused=_HALF_ONLY),
            "the module is loaded in this dtype, float32 by default",
            f"{_TRAINER}:233",
        ),
        Rule(
            "reduction",
            FromKey("trainer.model.reduce_dtype", Fixed("fp32"), refused=_HALF_ONLY),
            "FSDP's reduce_dtype, float32 by default",
            f"{_TRAINER}:236",
        ),
        Rule(
            "wire",
            Fixed("bf16"),
            "weights are gathered and sent in BF16, through files and through NCCL",
            "src/prime_rl/utils/weights.py:153",
        ),
        Rule(
            "engine",
            FromKey("inference.vllm.dtype", CHECKPOINT, AUTO_ENGINE),
            "passed to vLLM, whose auto keeps a half checkpoint's dtype and prefers BF16 for one in FP32",
            f"{_INFERENCE}:60",
        ),
        Rule(
            "kv",
            FromKey("inference.vllm.kv_cache_dtype", Like("engine"), AUTO_KV),
            "any argument of vLLM passes through; without it, the cache has the engine's dtype",
            f"{_INFERENCE}:42",
        ),
        Rule(
            "logits",
            Fixed("bf16"),
            "hidden states and the LM head are multiplied in the compute dtype",
            "src/prime_rl/trainer/models/layers/lm_head.py:134",
        ),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "logits are cast to FP32 chunk by chunk before the log-softmax",
            "src/prime_rl/trainer/models/layers/lm_head.py:135",
        ),
        Rule("scaler", Fixed("none"), "there is no loss scaler in the code", _MODEL),
    ),
    traps=(
        Trap(
            "the engine's LM head is computed in FP32, the trainer's in BF16 (inference.enable_fp32_lm_head)",
            f"{_INFERENCE}:466",
            (Is("inference.enable_fp32_lm_head", ("true",), "true"), Decided("compute", ("bf16",))),
        ),
    ),
    recipes=(
        Recipe(
            note="prime-rl cannot train in FP16: the trainer's BF16 is fixed in the code, and its FP16 pull request "
            "#1197 was closed. An FP16 engine alone (inference.vllm.dtype) leaves the mismatch of the BF16 trainer.",
            source=_MODEL,
        ),
    ),
    irrelevant=("*.moe_router_dtype", "*fp32_lm_head", "*fp32_router_logits", "*deep_gemm*"),
)
