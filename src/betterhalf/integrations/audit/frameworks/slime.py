"""Rules for slime, read from commit 624b824a8."""

from __future__ import annotations

from betterhalf.integrations.audit.records import (
    Decided,
    Fixed,
    Framework,
    FromKey,
    Has,
    Is,
    Like,
    Recipe,
    Rule,
    Trap,
)
from betterhalf.integrations.audit.words import AUTO_ENGINE, AUTO_KV, CHECKPOINT

_FP16 = (Is("fp16", ("true",), "false"),)
_ARGUMENTS = "slime/backends/megatron_utils/arguments.py:157"
_SGLANG = "slime/backends/sglang_utils/sglang_engine.py"
_SCALER = "slime/backends/megatron_utils/model.py:685"

FRAMEWORK = Framework(
    name="slime",
    title="slime",
    versions=("624b824a8",),
    repository="https://github.com/THUDM/slime",
    kinds=("shell",),
    marks=("hf-checkpoint", "rollout-num-gpus", "rollout-num-gpus-per-engine", "n-samples-per-prompt", "num-rollout"),
    rules=(
        Rule("compute", Fixed("fp16"), "Megatron computes in FP16", _ARGUMENTS, _FP16),
        Rule("compute", Fixed("bf16"), "slime sets bf16 to the opposite of fp16", _ARGUMENTS),
        Rule("masters", Fixed("fp32"), "Megatron's distributed optimizer keeps FP32 main parameters", _ARGUMENTS),
        Rule(
            "reduction",
            Fixed("fp32"),
            "Megatron reduces FP32 gradients",
            "megatron/training/arguments.py",
            (Is("accumulate-allreduce-grads-in-fp32", ("true",), "false"),),
        ),
        Rule(
            "reduction",
            Like("compute"),
            "without --accumulate-allreduce-grads-in-fp32 Megatron reduces FP16 gradients as they are",
            "megatron/training/arguments.py",
            _FP16,
        ),
        Rule("reduction", Fixed("fp32"), "Megatron turns FP32 reduction on for BF16", "megatron/training/arguments.py"),
        Rule(
            "wire",
            Like("compute"),
            "Megatron's parameters are converted to Hugging Face's names and sent in their own dtype",
            "slime/backends/megatron_utils/update_weight/update_weight_from_distributed.py:342",
        ),
        Rule("engine", Fixed("fp16"), "slime passes dtype float16 to SGLang", f"{_SGLANG}:571", _FP16),
        Rule(
            "engine",
            FromKey("sglang-dtype", CHECKPOINT, AUTO_ENGINE),
            "without --fp16 slime passes no dtype, and SGLang's auto takes the checkpoint's",
            f"{_SGLANG}:571",
        ),
        Rule(
            "kv",
            FromKey("sglang-kv-cache-dtype", Like("engine"), AUTO_KV),
            "SGLang's own flag, auto by default",
            f"{_SGLANG}:582",
        ),
        Rule("logits", Like("compute"), "the LM head computes in the model's dtype", "slime/utils/ppo_utils.py:199"),
        Rule(
            "logprobs", Fixed("fp32"), "logits are cast to FP32 before the log-softmax", "slime/utils/ppo_utils.py:199"
        ),
        Rule("scaler", Fixed("dynamic"), "Megatron's dynamic loss scale", _SCALER, _FP16),
        Rule("scaler", Fixed("none"), "only FP16 is scaled", _SCALER),
    ),
    traps=(
        Trap(
            "the first overflow ends the run at `assert update_successful`; with the NaN check off, gradients are "
            "unscaled twice (THUDM/slime#1842, #1495)",
            _SCALER,
            _FP16,
            breaks=True,
        ),
        Trap(
            "a file named by --sglang-config overrides the engine's flags, dtype included; audit does not read it",
            f"{_SGLANG}:589",
            (Has("sglang-config"),),
        ),
    ),
    recipes=(
        Recipe(
            note="slime cannot train in FP16 at this commit: --fp16 sets both sides, but the first overflow of the "
            "loss scale ends the run, or gradients are unscaled twice. It waits for THUDM/slime#1842.",
            source=_SCALER,
            when=(Decided("compute", ("fp16",)),),
        ),
        Recipe(
            note="slime cannot train in FP16 at this commit: --fp16 would set both sides, but the first overflow of "
            "the loss scale ends the run, or gradients are unscaled twice (THUDM/slime#1842).",
            source=_SCALER,
        ),
    ),
    irrelevant=(
        "use-precision-aware-optimizer",
        "attention-softmax-in-fp32",
        "moe-router-dtype",
        "fp16-lm-cross-entropy",
        "*-fp32-moe-router",
        "*fp32-lm-head",
    ),
)
