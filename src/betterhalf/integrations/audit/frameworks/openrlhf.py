"""Rules for OpenRLHF's RL trainer, read from the wheel of 0.11.2."""

from __future__ import annotations

from betterhalf.integrations.audit.records import (
    Decided,
    Fixed,
    Framework,
    FromKey,
    Has,
    Like,
    Recipe,
    Rule,
    Trap,
)

_ENGINE = "openrlhf/trainer/ray/vllm_engine.py:273"
_WRAP = "openrlhf/trainer/ray/vllm_worker_wrap.py:39"
_DEEPSPEED = "openrlhf/utils/deepspeed/deepspeed_utils.py"
_OLD = "before 0.10, whose flags had no groups"
_REFUSED = {"fp32": "--ds.param_dtype takes bf16 or fp16", "fp8": "--ds.param_dtype takes bf16 or fp16"}

FRAMEWORK = Framework(
    name="openrlhf",
    title="OpenRLHF",
    versions=("0.11.2", "3c3be623"),
    repository="https://github.com/OpenRLHF/OpenRLHF",
    kinds=("shell",),
    marks=("actor.model_name_or_path", "ds.zero_stage", "ds.param_dtype", "vllm.num_engines", "vllm.sync_backend"),
    commands=("openrlhf.cli.train_ppo_ray",),
    rules=(
        Rule(
            "compute",
            FromKey("ds.param_dtype", Fixed("bf16"), refused=_REFUSED),
            "DeepSpeed holds and computes in this dtype, bf16 by default",
            f"{_DEEPSPEED}:50",
        ),
        Rule("masters", Fixed("fp32"), "ZeRO's half optimizers keep FP32 partitions", f"{_DEEPSPEED}:50"),
        Rule("reduction", Like("compute"), "DeepSpeed reduces gradients in the model's dtype", f"{_DEEPSPEED}:58"),
        Rule(
            "wire",
            Like("compute"),
            "parameters are sent as DeepSpeed holds them",
            "openrlhf/trainer/ray/ppo_actor.py:427",
        ),
        Rule("engine", Fixed("bf16"), "vLLM's dtype is fixed in the code: no flag reaches it", _ENGINE),
        Rule("kv", Like("engine"), "the cache has the engine's dtype", _ENGINE),
        Rule("logits", Like("compute"), "the LM head computes in the model's dtype", "openrlhf/models/actor.py:267"),
        Rule(
            "logprobs", Fixed("fp32"), "logits are cast to FP32 before the log-softmax", "openrlhf/models/actor.py:267"
        ),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "DeepSpeed's dynamic loss scale starts at 65536",
            f"{_DEEPSPEED}:53",
            (Decided("compute", ("fp16",)),),
        ),
        Rule("scaler", Fixed("none"), "only FP16 is scaled", f"{_DEEPSPEED}:53"),
    ),
    traps=(
        Trap(
            "the run ends at its first weight sync: vLLM's worker asserts that the parameters sent have its own dtype, "
            "bf16",
            _WRAP,
            (Decided("compute", ("fp16",)),),
            breaks=True,
        ),
        Trap(
            "--ds.grad_accum_dtype sets the buffer that gradients of micro-batches are added in, not their reduction",
            f"{_DEEPSPEED}:58",
            (Has("ds.grad_accum_dtype"),),
        ),
    ),
    recipes=(
        Recipe(
            note="OpenRLHF cannot run RL in FP16 on both sides: the engine's BF16 is fixed in the code, and FP16 in "
            "the trainer fails at the first weight sync. Use --ds.param_dtype bf16, or another framework.",
            source=_ENGINE,
        ),
    ),
    irrelevant=("ds.grad_accum_dtype", "ds.load_in_4bit", "reward.*", "critic.*", "ref.*"),
    other_versions=dict.fromkeys(("pretrain", "zero_stage", "vllm_num_engines", "bf16", "actor_num_nodes"), _OLD),
)
