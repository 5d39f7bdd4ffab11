"""Rules for SkyRL, read from commit a9564572e; release 0.4.0 has no loss scaler either."""

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
from betterhalf.integrations.audit.words import AUTO_ENGINE, AUTO_KV

_MIXED = "trainer.policy.fsdp_config.mixed_precision"
_ENGINE_KEY = "generator.inference_engine.model_dtype"
_KV = "generator.inference_engine.engine_init_kwargs.kv_cache_dtype"
_DDP = "trainer.policy.megatron_config.ddp_config.grad_reduce_in_fp32"
_MEGATRON = (Is("trainer.strategy", ("megatron",), "fsdp"),)
_CONFIG = "skyrl/train/config/config.py"
_WORKER = "skyrl/backends/skyrl_train/workers/worker.py:974"
_STRATEGY = "skyrl/backends/skyrl_train/distributed/fsdp_strategy.py:206"
_OLD = "before 0.4, whose engine keys were not below generator.inference_engine"

FRAMEWORK = Framework(
    name="skyrl",
    title="SkyRL",
    versions=("a9564572e",),
    repository="https://github.com/NovaSky-AI/SkyRL",
    kinds=("yaml", "shell"),
    marks=(
        *(
            "generator.inference_engine.*",
            "trainer.policy.model.path",
            "trainer.placement.*",
            "trainer.policy_mini_batch_size",
        ),
        *("trainer.policy.fsdp_config.*", "generator.n_samples_per_prompt"),
    ),
    commands=("skyrl.train.entrypoints.*",),
    choices=(Choice("trainer.strategy", ("fsdp", "megatron"), "fsdp"),),
    rules=(
        Rule(
            "compute",
            Fixed("fp32"),
            "Megatron's module is built in FP32",
            f"{_CONFIG}:1381",
            (*_MEGATRON, Is("trainer.bf16", ("false",), "true")),
        ),
        Rule(
            "compute",
            Fixed("bf16"),
            "Megatron computes in BF16 or FP32; there is no FP16",
            f"{_CONFIG}:1381",
            _MEGATRON,
        ),
        Rule(
            "compute",
            Fixed("bf16"),
            "an autocast to BF16 is fixed around every forward pass, whatever param_dtype says",
            _WORKER,
        ),
        Rule(
            "masters",
            Fixed("fp32"),
            "Megatron's distributed optimizer keeps FP32 main parameters",
            "skyrl/backends/skyrl_train/distributed/megatron/optimizer.py:47",
            _MEGATRON,
        ),
        Rule(
            "masters",
            Fixed("fp32"),
            "the policy is loaded in FP32",
            "skyrl/backends/skyrl_train/workers/fsdp/fsdp_worker.py:161",
        ),
        Rule(
            "reduction",
            Like("compute"),
            "Megatron reduces gradients in the dtype of the parameters",
            f"{_CONFIG}:250",
            (*_MEGATRON, Is(_DDP, ("false",), "true")),
        ),
        Rule(
            "reduction", Fixed("fp32"), "Megatron's grad_reduce_in_fp32 is true by default", f"{_CONFIG}:250", _MEGATRON
        ),
        Rule(
            "reduction",
            FromKey(f"{_MIXED}.reduce_dtype", Fixed("fp32")),
            "FSDP's reduce_dtype, fp32 by default",
            "skyrl/backends/skyrl_train/distributed/fsdp_strategy.py:207",
        ),
        Rule(
            "wire",
            FromKey(_ENGINE_KEY, Fixed("bf16")),
            "weights are cast to the engine's dtype before they are sent",
            f"{_CONFIG}:1099",
        ),
        Rule("engine", FromKey(_ENGINE_KEY, Fixed("bf16"), AUTO_ENGINE), "passed to vLLM as dtype", f"{_CONFIG}:1099"),
        Rule(
            "kv",
            FromKey(_KV, Like("engine"), AUTO_KV),
            "engine_init_kwargs go to vLLM as they are; without the key, the cache has the engine's dtype",
            "skyrl/backends/skyrl_train/inference_servers/utils.py:91",
        ),
        Rule("logits", Like("compute"), "the LM head runs under the same autocast", _WORKER),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "flash-attn's cross entropy returns FP32",
            "skyrl/backends/skyrl_train/utils/torch_utils.py:137",
        ),
        Rule("scaler", Fixed("none"), "there is no loss scaler in the code", _STRATEGY),
    ),
    traps=(
        Trap(
            "param_dtype fp16 is accepted, but autocast still computes in BF16 and nothing scales the loss: weights "
            "are rounded to FP16 and products to BF16",
            _WORKER,
            (Is("trainer.strategy", ("fsdp",), "fsdp"), Is(f"{_MIXED}.param_dtype", ("fp16", "float16", "half"))),
            breaks=True,
        ),
        Trap(
            "trainer.bf16 has no effect on an FSDP policy: it is loaded in FP32 and computes in BF16",
            "skyrl/backends/skyrl_train/workers/fsdp/fsdp_worker.py:161",
            (Is("trainer.strategy", ("fsdp",), "fsdp"), Has("trainer.bf16")),
        ),
    ),
    recipes=(
        Recipe(
            note="SkyRL cannot train in FP16: Megatron takes BF16 or FP32 alone, and there is no loss scaler.",
            source=f"{_CONFIG}:1381",
            when=_MEGATRON,
        ),
        Recipe(
            note="SkyRL cannot train in FP16: the autocast to BF16 is fixed in the code, and there is no loss scaler. "
            "An FP16 engine alone (generator.inference_engine.model_dtype) leaves the mismatch of the BF16 trainer.",
            source=_WORKER,
            when=(Decided("scaler", ("none",)),),
        ),
    ),
    irrelevant=(
        *(
            "*.use_precision_aware_optimizer",
            "trainer.critic.*",
            "trainer.ref.*",
            "*.buffer_dtype",
            "*.param_dtype",
            "*.moe_router_dtype",
            "data.*",
        ),
        *("trainer.bf16", "environment.*"),
    ),
    other_versions=dict.fromkeys(
        ("generator.model_dtype", "generator.backend", "generator.num_inference_engines"), _OLD
    ),
)
