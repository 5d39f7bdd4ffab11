"""Rules for ROLL, read from commit 8eb27cc2."""

from __future__ import annotations

from betterhalf.integrations.audit.records import (
    Choice,
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
from betterhalf.integrations.audit.words import AUTO_KV, CHECKPOINT

_TRAIN = "actor_train.strategy_args"
_CONFIG = f"{_TRAIN}.strategy_config"
_NAME = f"{_TRAIN}.strategy_name"
_INFER = "actor_infer"
_KV = f"{_INFER}.strategy_args.strategy_config.kv_cache_dtype"
_ALLREDUCE = "actor_train.training_args.accumulate_allreduce_grads_in_fp32"
_IS_MEGATRON = (Is(_NAME, ("megatron_train",)),)
_IS_FSDP2 = (Is(_NAME, ("fsdp2_train",)),)
_FSDP2 = "roll/distributed/strategy/fsdp2_strategy.py"
_MEGATRON = "roll/distributed/strategy/megatron_strategy.py"
_ARGUMENTS = "mcore_adapter/src/mcore_adapter/training_args.py"
_VLLM = "roll/distributed/strategy/vllm_strategy.py"
_OWN = {"null": CHECKPOINT}

FRAMEWORK = Framework(
    name="roll",
    title="ROLL",
    versions=("8eb27cc2",),
    repository="https://github.com/alibaba/ROLL",
    kinds=("yaml",),
    marks=("actor_train.*", "actor_infer.*"),
    choices=(
        Choice(_NAME, ("megatron_train", "fsdp2_train"), None),
        Choice(f"{_INFER}.strategy_args.strategy_name", ("vllm", "sglang"), None),
    ),
    rules=(
        *(
            Rule(
                "compute",
                Fixed(dtype),
                "strategy_config overrides Megatron's own arguments",
                f"{_MEGATRON}:107",
                (*_IS_MEGATRON, Is(f"{_CONFIG}.{dtype}", ("true",), "false")),
            )
            for dtype in ("fp16", "bf16")
        ),
        Rule(
            "compute",
            FromKey("actor_train.model_args.dtype", Fixed("bf16"), _OWN),
            "it sets training_args.fp16 or bf16 of Megatron",
            "roll/configs/worker_config.py:329",
            _IS_MEGATRON,
        ),
        Rule(
            "compute",
            FromKey(f"{_CONFIG}.param_dtype", Fixed("bf16")),
            "FSDP2's param_dtype and autocast, BF16 by default; model_args.dtype does not reach them",
            f"{_FSDP2}:1004",
        ),
        Rule(
            "masters",
            Fixed("fp32"),
            "Megatron's distributed optimizer keeps FP32 main parameters",
            f"{_MEGATRON}:1179",
            _IS_MEGATRON,
        ),
        Rule(
            "masters",
            FromKey(f"{_CONFIG}.param_dtype", Fixed("fp32")),
            "the module is loaded in param_dtype; only without that key in FP32",
            f"{_FSDP2}:828",
        ),
        Rule(
            "reduction",
            Fixed("fp32"),
            "Megatron reduces FP32 gradients",
            f"{_ARGUMENTS}:322",
            (*_IS_MEGATRON, Is(_ALLREDUCE, ("true",), "false")),
        ),
        Rule(
            "reduction",
            Like("compute"),
            "accumulate_allreduce_grads_in_fp32 is false, and only BF16 turns it on",
            f"{_ARGUMENTS}:433",
            (*_IS_MEGATRON, Decided("compute", ("fp16",))),
        ),
        Rule(
            "reduction",
            Fixed("fp32"),
            "BF16 turns accumulate_allreduce_grads_in_fp32 on",
            f"{_ARGUMENTS}:433",
            _IS_MEGATRON,
        ),
        Rule(
            "reduction",
            FromKey(f"{_CONFIG}.reduce_dtype", Fixed("fp32")),
            "FSDP2's reduce_dtype, FP32 by default",
            f"{_FSDP2}:1005",
        ),
        Rule(
            "wire",
            Like("compute"),
            "Megatron's parameters are sent in their own dtype",
            f"{_MEGATRON}:1179",
            _IS_MEGATRON,
        ),
        Rule(
            "wire",
            Like("masters"),
            "gathered parameters are sent as they are stored",
            "roll/third_party/fsdp2/model_update.py:50",
        ),
        Rule(
            "engine",
            FromKey(f"{_INFER}.model_args.dtype", Fixed("bf16"), _OWN),
            "passed to vLLM and SGLang as dtype, BF16 by default",
            f"{_VLLM}:98",
        ),
        Rule(
            "kv",
            FromKey(_KV, Like("engine"), AUTO_KV),
            "strategy_config goes to the engine as it is; without the key, the cache has the engine's dtype",
            f"{_VLLM}:109",
        ),
        Rule(
            "logits", Like("compute"), "the LM head computes in the trainer's dtype", f"{_MEGATRON}:688", _IS_MEGATRON
        ),
        Rule("logits", Like("compute"), "the LM head runs under autocast", f"{_FSDP2}:1632"),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "logits are cast to FP32 before the log-softmax",
            "roll/utils/functionals.py:215",
        ),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "Megatron's dynamic loss scale",
            f"{_MEGATRON}:1190",
            (*_IS_MEGATRON, Decided("compute", ("fp16",))),
        ),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "ShardedGradScaler starts at 65536 and doubles after 400 clean steps",
            f"{_FSDP2}:1386",
            (Decided("compute", ("fp16",)),),
        ),
        Rule("scaler", Fixed("none"), "only FP16 is scaled", f"{_MEGATRON}:1190", _IS_MEGATRON),
        Rule("scaler", Fixed("none"), "only FP16 is scaled", f"{_FSDP2}:1383"),
    ),
    traps=(
        Trap(
            "fp16 and bf16 are both on: strategy_config.bf16 is added to the flag that model_args.dtype sets",
            f"{_MEGATRON}:107",
            (*_IS_MEGATRON, Is(f"{_CONFIG}.bf16", ("true",)), Is("actor_train.model_args.dtype", ("fp16",))),
            breaks=True,
        ),
        Trap(
            "model_args.dtype of actor_train has no effect on FSDP2: its key is strategy_config.param_dtype",
            f"{_FSDP2}:1004",
            (*_IS_FSDP2, Has("actor_train.model_args.dtype")),
        ),
        Trap(
            "in FP16, FSDP2 never calls zero_grad or the scheduler: both stand in the branch without a scaler, so "
            "gradients add up from step to step and the learning rate never moves",
            f"{_FSDP2}:1668",
            (*_IS_FSDP2, Decided("compute", ("fp16",))),
            breaks=True,
        ),
    ),
    recipes=(
        Recipe(
            (
                ("actor_train.model_args.dtype", "fp16"),
                (f"{_INFER}.model_args.dtype", "fp16"),
                ("reference.model_args.dtype", "fp16"),
                (_ALLREDUCE, "true"),
            ),
            "Three dtypes that nothing compares: keep them equal. The fourth key keeps the reduction of gradients in "
            "FP32, which BF16 does by itself.",
            "roll/configs/worker_config.py:331",
            _IS_MEGATRON,
        ),
        Recipe(
            note="ROLL's FSDP2 cannot train in FP16: gradients are never cleared. Use strategy_name = megatron_train, "
            "and audit the file again.",
            source=f"{_FSDP2}:1668",
        ),
    ),
    irrelevant=(
        *(
            "reference.*",
            "critic.*",
            "rewards.*",
            "reward.*",
            "reward_model.*",
            "*.buffer_dtype",
            "*_env_manager.*",
            "custom_envs.*",
        ),
        *("actor_train.model_args.dtype", f"{_CONFIG}.*_dtype", "teacher*"),
    ),
)
