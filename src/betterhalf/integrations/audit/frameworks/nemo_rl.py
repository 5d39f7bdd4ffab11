"""Rules for NeMo-RL, read from commit 7ea279abf (0.6 in its package)."""

from __future__ import annotations

from betterhalf.integrations.audit.records import (
    Choice,
    Decided,
    Depends,
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

_PRECISION = "policy.precision"
_MEGATRON_ON = "policy.megatron_cfg.enabled"
_OPTIMIZER = "policy.megatron_cfg.optimizer"
_REDUCE = "policy.megatron_cfg.distributed_data_parallel_config.grad_reduce_in_fp32"
_VLLM = "policy.generation.vllm_cfg"
_BACKEND = "policy.generation.backend"
_SGLANG = "policy.generation.sglang_cfg"
_BY_SGLANG = (Is(_BACKEND, ("sglang",), "vllm"),)
_BY_MEGATRON = (Is(_BACKEND, ("megatron",), "vllm"),)
_IS_MEGATRON = (Is(_MEGATRON_ON, ("true",), "false"),)
_SETUP = "nemo_rl/models/megatron/setup.py"
_AUTOMODEL = "nemo_rl/models/automodel/setup.py"
_SGLANG_WORKER = "nemo_rl/models/generation/sglang/sglang_worker.py"
_MEGATRON_WORKER = "nemo_rl/models/generation/megatron/megatron_worker.py"
_WORKER = "nemo_rl/models/generation/vllm/vllm_worker.py"
_UNSET = Depends("policy.precision, which the file does not set and NeMo-RL requires")
_AWARE = Is(f"{_OPTIMIZER}.use_precision_aware_optimizer", ("true",), "true")

FRAMEWORK = Framework(
    name="nemo-rl",
    title="NeMo-RL",
    versions=("7ea279abf",),
    repository="https://github.com/NVIDIA-NeMo/RL",
    kinds=("yaml",),
    marks=(
        *("policy.precision", "policy.dtensor_cfg.*", "policy.megatron_cfg.*", "policy.generation.vllm_cfg.*"),
        *(f"{_SGLANG}.*", "policy.generation.mcore_generation_config.*"),
    ),
    extends="defaults",
    choices=(Choice(_BACKEND, ("vllm", "sglang", "megatron"), "vllm"),),
    rules=(
        Rule(
            "compute",
            Fixed("fp8"),
            "Megatron's linear layers are quantised in training",
            f"{_SETUP}:748",
            (*_IS_MEGATRON, Is("policy.megatron_cfg.fp8_cfg.enabled", ("true",), "false")),
        ),
        Rule(
            "compute",
            FromKey(_PRECISION, _UNSET),
            "Megatron's module has this dtype",
            f"{_SETUP}:1046",
            _IS_MEGATRON,
        ),
        Rule("compute", FromKey(_PRECISION, _UNSET), "FSDP2's param_dtype, and autocast", f"{_AUTOMODEL}:485"),
        Rule("masters", Fixed("fp32"), "Megatron keeps FP32 main parameters", f"{_SETUP}:1384", _IS_MEGATRON),
        Rule("masters", Fixed("fp32"), "the policy is always loaded in FP32", f"{_AUTOMODEL}:330"),
        Rule(
            "reduction",
            Fixed("fp32"),
            "Megatron reduces FP32 gradients",
            f"{_SETUP}:1424",
            (*_IS_MEGATRON, Is(_REDUCE, ("true",), "unset")),
        ),
        Rule(
            "reduction",
            Like("compute"),
            "Megatron reduces gradients in the dtype of the parameters",
            f"{_SETUP}:1424",
            (*_IS_MEGATRON, Is(_REDUCE, ("false",), "unset")),
        ),
        Rule(
            "reduction",
            Depends("grad_reduce_in_fp32, which the file does not set"),
            "NeMo-RL requires the key",
            f"{_SETUP}:1424",
            _IS_MEGATRON,
        ),
        Rule("reduction", Fixed("fp32"), "FSDP2's reduce_dtype is fixed in the code", f"{_AUTOMODEL}:486"),
        *(
            Rule(
                role,
                Depends("the FP8 recipe"),
                "the LM head may be kept out of it, and the export may dequantise",
                f"{_SETUP}:748",
                (Decided("compute", ("fp8",)),),
            )
            for role in ("wire", "logits")
        ),
        Rule(
            "wire",
            Like("compute"),
            "weights are exported in policy.precision",
            "nemo_rl/models/policy/workers/megatron_policy_worker.py:2307",
            _IS_MEGATRON,
        ),
        Rule(
            "wire",
            Like("compute"),
            "weights are cast to policy.precision before they are sent",
            "nemo_rl/models/policy/workers/dtensor_policy_worker_v2.py:115",
        ),
        Rule(
            "engine",
            FromKey(f"{_SGLANG}.dtype", CHECKPOINT, AUTO_ENGINE),
            "passed to SGLang as dtype, if it is set; SGLang's default is auto",
            f"{_SGLANG_WORKER}:418",
            _BY_SGLANG,
        ),
        Rule(
            "engine",
            Like("compute"),
            "Megatron samples with the policy's own model, or with one that is built from the same policy.precision",
            f"{_MEGATRON_WORKER}:85",
            _BY_MEGATRON,
        ),
        Rule(
            "engine",
            FromKey(f"{_VLLM}.precision", Depends("vllm_cfg.precision, which the file does not set"), AUTO_ENGINE),
            "passed to vLLM as dtype; the shipped files tie it to policy.precision",
            f"{_WORKER}:581",
        ),
        Rule(
            "kv",
            FromKey(f"{_SGLANG}.kv_cache_dtype", Like("engine"), AUTO_KV),
            "passed to SGLang, if it is set; auto is the engine's dtype",
            f"{_SGLANG_WORKER}:419",
            _BY_SGLANG,
        ),
        Rule(
            "kv",
            Depends("the FP8 recipe"),
            "the cache has the dtype of the parameters",
            f"{_MEGATRON_WORKER}:209",
            (*_BY_MEGATRON, Decided("engine", ("fp8",))),
        ),
        Rule(
            "kv",
            Like("engine"),
            "Megatron's inference context holds the cache in the dtype of the parameters",
            f"{_MEGATRON_WORKER}:209, megatron/core/inference/contexts/dynamic_context.py:671 of Megatron-Core 0.16.1",
            _BY_MEGATRON,
        ),
        Rule(
            "kv",
            FromKey(f"{_VLLM}.kv_cache_dtype", Fixed("bf16"), {"auto": Fixed("bf16")}),
            "an engine with FP8 weights computes and caches in BF16 unless the cache is FP8, too",
            f"{_WORKER}:489",
            (Decided("engine", ("fp8",)),),
        ),
        Rule(
            "kv",
            FromKey(f"{_VLLM}.kv_cache_dtype", Like("engine"), AUTO_KV),
            "passed to vLLM; auto is the engine's dtype",
            "nemo_rl/models/generation/vllm/config.py:69",
        ),
        Rule("logits", Like("compute"), "the LM head computes in the policy's dtype", f"{_SETUP}:1046", _IS_MEGATRON),
        Rule("logits", Fixed("fp32"), "FSDP2's output_dtype casts the logits to FP32", f"{_AUTOMODEL}:487"),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "logits are cast to FP32 before the log-softmax",
            "nemo_rl/distributed/model_utils.py:141",
        ),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "Megatron's dynamic loss scale",
            f"{_SETUP}:1384",
            (*_IS_MEGATRON, Decided("compute", ("fp16",)), Is(f"{_OPTIMIZER}.fp16", ("true",), "false")),
        ),
        Rule("scaler", Fixed("none"), "only Megatron's FP16 optimizer scales", f"{_SETUP}:1384", _IS_MEGATRON),
        Rule("scaler", Fixed("none"), "there is no GradScaler in the code (PR #1474 is open)", f"{_AUTOMODEL}:484"),
    ),
    traps=(
        Trap(
            "only DTensor workers send weights to SGLang: with Megatron the first weight sync ends the run",
            "nemo_rl/models/policy/interfaces.py:217",
            (*_IS_MEGATRON, *_BY_SGLANG),
            breaks=True,
        ),
        Trap(
            "only Megatron's workers sample with Megatron",
            f"{_MEGATRON_WORKER}:85",
            (Is(_MEGATRON_ON, ("false",), "false"), *_BY_MEGATRON),
            breaks=True,
        ),
        Trap(
            "the run is refused at start: policy.precision float16 needs megatron_cfg.optimizer.fp16 = true beside the "
            "precision-aware optimizer",
            f"{_SETUP}:1348",
            (*_IS_MEGATRON, Decided("compute", ("fp16",)), _AWARE, Is(f"{_OPTIMIZER}.fp16", ("false",), "false")),
            breaks=True,
        ),
        Trap(
            "the run is refused at start: policy.precision bfloat16 needs megatron_cfg.optimizer.bf16 = true beside "
            "the precision-aware optimizer",
            f"{_SETUP}:1338",
            (*_IS_MEGATRON, Decided("compute", ("bf16",)), _AWARE, Is(f"{_OPTIMIZER}.bf16", ("false",), "true")),
            breaks=True,
        ),
    ),
    recipes=(
        Recipe(
            note="NeMo-RL cannot train in FP16 with SGLang at this commit: DTensor has no loss scaler, and Megatron "
            f"sends no weights to SGLang. Use {_BACKEND} = vllm or megatron, and audit the file again.",
            source=f"{_AUTOMODEL}:484",
            when=_BY_SGLANG,
        ),
        Recipe(
            (
                (_PRECISION, "float16"),
                (f"{_OPTIMIZER}.fp16", "true"),
                (f"{_OPTIMIZER}.bf16", "false"),
                ("policy.megatron_cfg.pipeline_dtype", "float16"),
            ),
            "Megatron samples with the policy's model, so policy.precision sets both sides.",
            f"{_SETUP}:1344",
            (*_IS_MEGATRON, *_BY_MEGATRON),
        ),
        Recipe(
            (
                (_PRECISION, "float16"),
                (f"{_OPTIMIZER}.fp16", "true"),
                (f"{_OPTIMIZER}.bf16", "false"),
                (f"{_VLLM}.precision", "float16"),
                ("policy.megatron_cfg.pipeline_dtype", "float16"),
            ),
            "Keep ${policy.precision} where the shipped files have it. NeMo-RL itself refuses an inconsistent set.",
            f"{_SETUP}:1344",
            _IS_MEGATRON,
        ),
        Recipe(
            ((_MEGATRON_ON, "true"), ("policy.dtensor_cfg.enabled", "false"), (_PRECISION, "float16")),
            "DTensor has no loss scaler, so FP16 needs the Megatron backend; audit the file again after this change.",
            f"{_AUTOMODEL}:484",
        ),
    ),
    irrelevant=(
        *("*.moe_router_dtype", "*.fp8_cfg.fp8*", "*.lora_dtype", f"{_OPTIMIZER}.*", "value.*", "policy.draft.*"),
        *("*.exp_avg*_dtype", "*.defer_fp32_logits", "*.real_quant_export_cpu_offload", "*.env_vars.*"),
        *("on_policy_distillation.*", "*.use_precision_aware_optimizer"),
        *("*.pipeline_dtype", "reward_model*", "teacher*", "env.*", "data.*"),
    ),
)
