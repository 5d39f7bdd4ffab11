"""Rules for verl, read from the wheel of 0.9.1; commit 1dda039b9 of its main branch behaves alike."""

from __future__ import annotations

from betterhalf.integrations.audit.records import (
    Choice,
    Decided,
    Depends,
    Fixed,
    Framework,
    FromKey,
    Has,
    Implied,
    Is,
    Like,
    Recipe,
    Rule,
    Trap,
)
from betterhalf.integrations.audit.words import AUTO_ENGINE, AUTO_KV

_POLICY = "actor_rollout_ref.actor"
_FSDP = f"{_POLICY}.fsdp_config"
_MIXED = f"{_FSDP}.mixed_precision"
_STRATEGY = f"{_POLICY}.strategy"
_MEGATRON = f"{_POLICY}.megatron"
_DDP = f"{_MEGATRON}.override_ddp_config.grad_reduce_in_fp32"
_ROLLOUT = "actor_rollout_ref.rollout"
_LORA = "actor_rollout_ref.model.lora_rank"
_MERGE = "actor_rollout_ref.model.lora.merge"

_VEOMNI = f"{_POLICY}.veomni"
_TITAN = f"{_POLICY}.torchtitan"

_IS_MEGATRON = (Is(_STRATEGY, ("megatron",)),)
_IS_VEOMNI = (Is(_STRATEGY, ("veomni",)),)
_IS_TITAN = (Is(_STRATEGY, ("torchtitan",)),)
_NO_MIX = Is(f"{_VEOMNI}.mixed_precision", ("false",), "true")
_ENGINE = "verl/workers/engine/fsdp/transformer_impl.py"
_MEGATRON_ENGINE = "verl/workers/engine/megatron/transformer_impl.py"
_VEOMNI_ENGINE = "verl/workers/engine/veomni/transformer_impl.py"
_VEOMNI_MIX = "veomni/arguments/arguments_types.py"
_TITAN_ENGINE = "verl/workers/engine/torchtitan/transformer_impl.py"
_TITAN_CONFIG = "torchtitan/config/configs.py"
_SERVER = "verl/workers/rollout/vllm_rollout/vllm_async_server.py"

FRAMEWORK = Framework(
    name="verl",
    title="verl",
    versions=("0.9.1", "1dda039b9"),
    repository="https://github.com/verl-project/verl",
    kinds=("yaml", "shell"),
    marks=("actor_rollout_ref.*",),
    commands=("verl.trainer.main_ppo",),
    choices=(Choice(_STRATEGY, ("fsdp", "fsdp2", "megatron", "veomni", "torchtitan"), "fsdp"),),
    implied=(
        Implied((Is("model_engine", ("megatron",)),), _STRATEGY, "megatron"),
        Implied((Is("config-name", ("*megatron*",)),), _STRATEGY, "megatron"),
        Implied((Is("defaults.*.override model_engine", ("megatron",)),), _STRATEGY, "megatron"),
        *(Implied((Is("model_engine", (name,)),), _STRATEGY, name) for name in ("veomni", "torchtitan", "automodel")),
    ),
    rules=(
        Rule(
            "compute",
            Fixed("bf16"),
            "verl gives VeOmni's mixed precision no dtype, and its param_dtype is BF16; without it the model is loaded "
            "in BF16",
            f"{_VEOMNI_ENGINE}:337, {_VEOMNI_MIX}:249 of VeOmni 0.1.11",
            _IS_VEOMNI,
        ),
        Rule("compute", Fixed("bf16"), "the autocast is fixed in the code", f"{_TITAN_ENGINE}:863", _IS_TITAN),
        Rule(
            "compute",
            FromKey(f"{_MEGATRON}.dtype", Fixed("bf16")),
            "Megatron computes in the dtype of its engine, BF16 by default",
            f"{_MEGATRON_ENGINE}:292",
            _IS_MEGATRON,
        ),
        Rule(
            "compute",
            FromKey(f"{_MIXED}.param_dtype", Fixed("bf16")),
            "FSDP's parameters and autocast take this key, BF16 by default; fsdp_config.dtype is never read",
            f"{_ENGINE}:393",
        ),
        Rule(
            "masters",
            Fixed("bf16"),
            "without mixed precision VeOmni loads the model in BF16, and the optimizer updates it",
            f"{_VEOMNI_ENGINE}:343",
            (*_IS_VEOMNI, _NO_MIX),
        ),
        Rule("masters", Fixed("fp32"), "VeOmni loads the model in FP32", f"{_VEOMNI_ENGINE}:343", _IS_VEOMNI),
        Rule(
            "masters",
            Fixed("fp32"),
            "verl gives torchtitan no dtype, and its default is FP32",
            f"{_TITAN_ENGINE}:184, {_TITAN_CONFIG}:78 of torchtitan 0.3.0",
            _IS_TITAN,
        ),
        Rule(
            "masters",
            Fixed("fp32"),
            "Megatron's optimizer keeps FP32 main parameters",
            "verl/utils/megatron/optimizer.py:158",
            _IS_MEGATRON,
        ),
        Rule(
            "masters",
            FromKey(f"{_FSDP}.model_dtype", Fixed("fp32")),
            "the module is loaded in this dtype, FP32 by default, and Adam's states follow it",
            f"{_ENGINE}:258",
        ),
        Rule(
            "reduction",
            Like("compute"),
            "without mixed precision gradients have the dtype of the parameters",
            f"{_VEOMNI_ENGINE}:343",
            (*_IS_VEOMNI, _NO_MIX),
        ),
        Rule(
            "reduction",
            Fixed("fp32"),
            "the reduce_dtype of VeOmni's mixed precision is FP32",
            f"{_VEOMNI_MIX}:253 of VeOmni 0.1.11",
            _IS_VEOMNI,
        ),
        Rule("reduction", Fixed("fp32"), "torchtitan reduces in FP32 alone", f"{_TITAN_CONFIG}:93 of 0.3.0", _IS_TITAN),
        Rule(
            "reduction",
            Like("compute"),
            "Megatron reduces gradients in the dtype of the parameters",
            f"{_MEGATRON_ENGINE}:455",
            (*_IS_MEGATRON, Is(_DDP, ("false",))),
        ),
        Rule(
            "reduction",
            FromKey(f"{_POLICY}.optim.main_grads_dtype", Fixed("fp32")),
            "the precision-aware optimizer chooses the dtype of Megatron's gradient buckets",
            f"{_MEGATRON_ENGINE}:458",
            (*_IS_MEGATRON, Is(f"{_POLICY}.optim.use_precision_aware_optimizer", ("true",), "false")),
        ),
        Rule(
            "reduction",
            Fixed("fp32"),
            "Megatron's gradient buckets hold FP32",
            f"{_MEGATRON_ENGINE}:460",
            _IS_MEGATRON,
        ),
        Rule(
            "reduction",
            FromKey(f"{_MIXED}.reduce_dtype", Fixed("fp32")),
            "FSDP's reduce_dtype, FP32 by default",
            f"{_ENGINE}:394",
        ),
        Rule(
            "wire",
            Like("masters"),
            "VeOmni's parameters are sent as they are stored, and the engine rounds them once",
            f"{_VEOMNI_ENGINE}:653",
            _IS_VEOMNI,
        ),
        Rule(
            "wire",
            Fixed("bf16"),
            "sharded parameters are cast to BF16 before they are sent",
            f"{_TITAN_ENGINE}:660",
            _IS_TITAN,
        ),
        Rule(
            "wire",
            Like("compute"),
            "the bridge exports Megatron's parameters, which have the compute dtype",
            f"{_MEGATRON_ENGINE}:1042",
            _IS_MEGATRON,
        ),
        Rule(
            "wire",
            Fixed("bf16"),
            "merged LoRA weights are cast to BF16, whatever the dtypes of trainer and engine",
            f"{_ENGINE}:1082",
            (Is(_MERGE, ("true",)), Is(_LORA, ("[1-9]*",))),
        ),
        Rule(
            "wire",
            Like("masters"),
            "FSDP sends the gathered parameters as they are stored, and the engine rounds them once",
            f"{_ENGINE}:1032",
        ),
        Rule(
            "engine",
            Fixed("fp8"),
            "the engine quantises the weights that it receives",
            f"{_SERVER}:1211",
            (Is(f"{_ROLLOUT}.quantization", ("fp8",)),),
        ),
        Rule(
            "engine",
            FromKey(f"{_ROLLOUT}.dtype", Fixed("bf16"), AUTO_ENGINE),
            "passed to vLLM and SGLang as dtype, BF16 by default",
            f"{_SERVER}:326",
        ),
        Rule(
            "kv",
            FromKey(f"{_ROLLOUT}.dtype", Fixed("bf16"), AUTO_ENGINE),
            "an engine with FP8 weights computes and caches in its own dtype",
            f"{_SERVER}:326",
            (Decided("engine", ("fp8",)),),
        ),
        Rule(
            "kv",
            FromKey(f"{_ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype", Like("engine"), AUTO_KV),
            "engine_kwargs go to the engine as they are; without the key, the cache has the engine's dtype",
            f"{_SERVER}:287",
            (Has(f"{_ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype"),),
        ),
        Rule(
            "kv",
            FromKey(f"{_ROLLOUT}.engine_kwargs.sglang.kv_cache_dtype", Like("engine"), AUTO_KV),
            "engine_kwargs go to the engine as they are; without the key, the cache has the engine's dtype",
            f"{_SERVER}:287",
        ),
        Rule("logits", Like("compute"), "the LM head runs under autocast", f"{_TITAN_ENGINE}:863", _IS_TITAN),
        Rule(
            "logits",
            Like("compute"),
            "the LM head computes in the trainer's dtype",
            f"{_ENGINE}:1559",
        ),
        Rule(
            "logprobs",
            Depends("the loss kernel of VeOmni"),
            "fused kernels compute logprobs inside VeOmni",
            f"{_VEOMNI_ENGINE}:849",
            (*_IS_VEOMNI, Is("actor_rollout_ref.model.use_fused_kernels", ("true",), "false")),
        ),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "Megatron's vocabulary-parallel cross entropy sums in FP32",
            "verl/utils/megatron/tensor_parallel.py:201",
            _IS_MEGATRON,
        ),
        Rule(
            "logprobs",
            Depends("flash-attn: FP32 with it, the logits' dtype without it"),
            "flash-attn's cross entropy returns FP32, the fallback is a log-softmax of the logits",
            "verl/utils/torch_functional.py:101",
            (Decided("compute", ("fp16", "bf16")),),
        ),
        Rule("logprobs", Fixed("fp32"), "of FP32 logits", "verl/utils/torch_functional.py:101"),
        Rule("scaler", Fixed("none"), "verl makes no scaler for VeOmni", f"{_ENGINE}:747", _IS_VEOMNI),
        Rule("scaler", Fixed("none"), "verl makes no scaler for torchtitan", f"{_TITAN_ENGINE}:863", _IS_TITAN),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "Megatron's scaler starts at 32768, with a floor of 1",
            "verl/utils/megatron/optimizer.py:165",
            (*_IS_MEGATRON, Decided("compute", ("fp16",))),
        ),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "ShardedGradScaler starts at 65536 and doubles after 400 clean steps",
            f"{_ENGINE}:409",
            (Decided("compute", ("fp16",)),),
        ),
        Rule("scaler", Fixed("none"), "only FP16 is scaled", f"{_ENGINE}:411"),
    ),
    traps=(
        Trap(
            "fsdp_config.dtype has no effect: the FSDP engine reads fsdp_config.mixed_precision.param_dtype alone",
            f"{_ENGINE}:393",
            (Is(_STRATEGY, ("fsdp", "fsdp2"), "fsdp"), Has(f"{_FSDP}.dtype")),
        ),
        Trap(
            "torchtitan.dtype has no effect: verl builds torchtitan's configuration without it, and its autocast is "
            "BF16",
            f"{_TITAN_ENGINE}:184",
            (*_IS_TITAN, Has(f"{_TITAN}.dtype")),
        ),
        Trap(
            "torchtitan.mixed_precision has no effect: verl builds torchtitan's configuration without it",
            f"{_TITAN_ENGINE}:184",
            (*_IS_TITAN, Has(f"{_TITAN}.mixed_precision")),
        ),
        Trap(
            "the loss scale is not part of FSDP's checkpoint: every resume starts again at 65536",
            f"{_ENGINE}:409",
            (Is(_STRATEGY, ("fsdp", "fsdp2"), "fsdp"), Decided("compute", ("fp16",))),
        ),
        Trap(
            "the weight sync by deltas casts shards to BF16 before it sends them",
            f"{_ENGINE}:944",
            (Is(f"{_ROLLOUT}.checkpoint_engine.backend", ("*delta*",)), Is(_STRATEGY, ("fsdp", "fsdp2"), "fsdp")),
            breaks=True,
        ),
        Trap(
            "the weight sync by deltas casts shards to BF16 before it sends them",
            "verl/workers/engine/veomni/utils.py:374",
            (Is(f"{_ROLLOUT}.checkpoint_engine.backend", ("*delta*",)), *_IS_VEOMNI, Decided("engine", ("fp16",))),
            breaks=True,
        ),
    ),
    recipes=(
        *(
            Recipe(
                note=f"verl's {name} backend cannot train in FP16: its BF16 is fixed in the code, and nothing scales "
                f"the loss. Use {_STRATEGY} = fsdp2 or megatron, and audit the file again.",
                source=source,
                when=when,
            )
            for name, source, when in (
                ("VeOmni", f"{_VEOMNI_ENGINE}:337", _IS_VEOMNI),
                ("torchtitan", f"{_TITAN_ENGINE}:863", _IS_TITAN),
            )
        ),
        Recipe(
            (
                (f"{_MEGATRON}.dtype", "float16"),
                ("actor_rollout_ref.ref.megatron.dtype", "float16"),
                (f"{_ROLLOUT}.dtype", "float16"),
            ),
            "Three keys that nothing compares: keep them equal.",
            f"{_MEGATRON_ENGINE}:545",
            _IS_MEGATRON,
        ),
        Recipe(
            (
                (f"{_MIXED}.param_dtype", "fp16"),
                ("actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype", "fp16"),
                (f"{_ROLLOUT}.dtype", "float16"),
            ),
            "On a command line the keys of mixed_precision need a leading +. Do not merge LoRA weights, and do not "
            "sync by deltas: both cast to BF16.",
            f"{_ENGINE}:393",
        ),
    ),
    irrelevant=(
        *("critic.*", "reward.*", "reward_model.*", "actor_rollout_ref.ref.*", "data.*", "teacher*", "distillation.*"),
        *("*.buffer_dtype", "*.qat.*", "*.turbo_config.*", "*.moe_router_dtype", "actor_rollout_ref.model.*dtype*"),
        *(
            f"{_FSDP}.dtype",
            f"{_FSDP}.mixed_precision.*",
            f"{_POLICY}.optim.*",
            f"{_MEGATRON}.dtype",
            f"{_ROLLOUT}.qat*",
        ),
    ),
)
