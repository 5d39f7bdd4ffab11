"""Rules for AReaL, read from the wheel of 1.0.4."""

from __future__ import annotations

from betterhalf.integrations.audit.records import (
    Choice,
    Decided,
    Depends,
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

_CLI = "areal/api/cli_args.py"
_FSDP = "areal/engine/fsdp_utils/parallel.py:385"
_MEGATRON = "areal/engine/megatron_engine.py"
_ARCHON = "areal/experimental/engine/archon_engine.py"
_IS_MEGATRON = (Is("actor.backend", ("megatron:*",)),)
_IS_ARCHON = (Is("actor.backend", ("archon:*",)),)
_IS_SGLANG = (Is("rollout.backend", ("sglang:*",)),)
_DTYPE = FromKey("actor.dtype", Fixed("bf16"))
_REFUSED = {"fp16": "AReaL takes float32 or bfloat16 there", "fp8": "AReaL takes float32 or bfloat16 there"}

FRAMEWORK = Framework(
    name="areal",
    title="AReaL",
    versions=("1.0.4",),
    repository="https://github.com/areal-project/AReaL",
    kinds=("yaml",),
    marks=("actor.backend", "gconfig.*", "rollout.max_head_offpolicyness", "actor.use_decoupled_loss"),
    choices=(
        Choice("actor.backend", ("fsdp:*", "megatron:*", "archon:*"), None),
        Choice("rollout.backend", ("sglang:*", "vllm:*"), None),
    ),
    rules=(
        Rule(
            "compute",
            Fixed("fp8"),
            "Megatron's linear layers are quantised in training",
            f"{_MEGATRON}:1347",
            (*_IS_MEGATRON, Has("actor.megatron.fp8_config.mode")),
        ),
        Rule("compute", _DTYPE, "Megatron's module and optimizer have this dtype", f"{_MEGATRON}:1336", _IS_MEGATRON),
        Rule(
            "compute",
            Fixed("fp8"),
            "Archon's linear layers are quantised in training",
            f"{_ARCHON}:320",
            (*_IS_ARCHON, Is("actor.archon.fp8_config.mode", ("blockwise",), "disabled")),
        ),
        Rule("compute", _DTYPE, "FSDP2's param_dtype, bfloat16 by default", f"{_ARCHON}:954", _IS_ARCHON),
        Rule("compute", _DTYPE, "FSDP2's param_dtype, bfloat16 by default", _FSDP),
        Rule(
            "masters",
            FromKey("actor.megatron.main_params_dtype", Fixed("fp32")),
            "main_params_dtype of Megatron's optimizer, float32 by default",
            f"{_CLI}:871",
            _IS_MEGATRON,
        ),
        Rule(
            "masters",
            _DTYPE,
            "Archon casts the whole model to actor.dtype, and AdamW updates these weights",
            f"{_ARCHON}:1085",
            _IS_ARCHON,
        ),
        Rule(
            "masters",
            FromKey("actor.optimizer_dtype", Fixed("fp32"), refused=_REFUSED),
            "weights and Adam's states are stored in this dtype, float32 by default",
            f"{_CLI}:1127",
        ),
        Rule(
            "reduction",
            Like("compute"),
            "Megatron reduces gradients in the dtype of the parameters",
            f"{_CLI}:719",
            (*_IS_MEGATRON, Is("actor.megatron.ddp.grad_reduce_in_fp32", ("false",), "true")),
        ),
        Rule("reduction", Fixed("fp32"), "grad_reduce_in_fp32 is true by default", f"{_CLI}:719", _IS_MEGATRON),
        Rule("reduction", Fixed("fp32"), "FSDP2's reduce_dtype is fixed in the code", f"{_ARCHON}:955", _IS_ARCHON),
        Rule(
            "reduction",
            FromKey("actor.grad_reduce_dtype", Fixed("fp32")),
            "FSDP2's reduce_dtype, float32 by default",
            "areal/engine/fsdp_utils/parallel.py:386",
        ),
        Rule(
            "wire",
            Like("masters"),
            "Archon's parameters are sent as they are stored",
            "areal/experimental/engine/archon_weight_sync.py:316",
            _IS_ARCHON,
        ),
        Rule(
            "wire",
            Depends("the FP8 recipe"),
            "FP8 parameters are sent as they are, or converted to BF16",
            f"{_MEGATRON}:1501",
            (Decided("compute", ("fp8",)),),
        ),
        Rule(
            "wire",
            Like("compute"),
            "Megatron's parameters are sent in their own dtype",
            f"{_MEGATRON}:1439",
            _IS_MEGATRON,
        ),
        Rule(
            "wire",
            Like("compute"),
            "parameters are cast to the compute dtype before they are sent",
            "areal/engine/fsdp_engine.py:1620",
        ),
        Rule(
            "engine",
            FromKey("sglang.dtype", Fixed("bf16"), AUTO_ENGINE),
            "a key of its own, which the shipped files tie to actor.dtype",
            f"{_CLI}:1854",
            _IS_SGLANG,
        ),
        Rule(
            "engine",
            FromKey("vllm.dtype", Fixed("bf16"), AUTO_ENGINE),
            "a key of its own, which the shipped files tie to actor.dtype",
            f"{_CLI}:1698",
        ),
        Rule(
            "kv",
            FromKey("sglang.kv_cache_dtype", Like("engine"), AUTO_KV),
            "SGLang's cache, auto by default",
            f"{_CLI}:1855",
            _IS_SGLANG,
        ),
        Rule("kv", Like("engine"), "vLLM's cache has the engine's dtype", f"{_CLI}:1698"),
        Rule(
            "logits",
            Depends("the FP8 recipe"),
            "the LM head may be kept out of it",
            f"{_MEGATRON}:1347",
            (Decided("compute", ("fp8",)),),
        ),
        Rule("logits", Like("compute"), "the LM head computes in the model's dtype", f"{_ARCHON}:954", _IS_ARCHON),
        Rule("logits", Like("compute"), "the LM head computes in the model's dtype", _FSDP),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "logits are cast to FP32 before the log-softmax",
            "areal/utils/functional/vocab_parallel.py:18",
        ),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "Megatron's dynamic loss scale with Megatron's own defaults",
            f"{_MEGATRON}:970",
            (*_IS_MEGATRON, Decided("compute", ("fp16",))),
        ),
        Rule("scaler", Fixed("none"), "Megatron scales FP16 alone", f"{_MEGATRON}:970", _IS_MEGATRON),
        Rule("scaler", Fixed("none"), "there is no GradScaler in the Archon engine", f"{_ARCHON}:500", _IS_ARCHON),
        Rule("scaler", Fixed("none"), "there is no GradScaler in the FSDP engine", "areal/engine/fsdp_engine.py:1288"),
    ),
    traps=(
        Trap(
            "optimizer.initial_loss_scale, min_loss_scale, loss_scale_window and hysteresis are read by nothing",
            f"{_CLI}:387",
            (Has("actor.optimizer.*loss_scale*"),),
        ),
        *(
            Trap(f"{key} has no effect: the Archon engine does not read it", f"{_ARCHON}:1085", (*_IS_ARCHON, Has(key)))
            for key in ("actor.optimizer_dtype", "actor.grad_reduce_dtype")
        ),
        Trap(
            "FSDP refuses FP16 for vision models",
            "areal/engine/fsdp_engine.py:1041",
            (Is("actor.backend", ("fsdp:*",)), Decided("compute", ("fp16",))),
        ),
    ),
    recipes=(
        Recipe(
            (("actor.dtype", "float16"), ("ref.dtype", "float16"), ("sglang.dtype", "float16")),
            "The scaler's keys below actor.optimizer have no effect.",
            f"{_MEGATRON}:1336",
            (*_IS_MEGATRON, *_IS_SGLANG),
        ),
        Recipe(
            (("actor.dtype", "float16"), ("ref.dtype", "float16"), ("vllm.dtype", "float16")),
            "The scaler's keys below actor.optimizer have no effect.",
            f"{_MEGATRON}:1336",
            _IS_MEGATRON,
        ),
        Recipe(
            note="AReaL's Archon engine cannot train in FP16: it has neither a loss scaler nor FP32 master weights. "
            "Use actor.backend = megatron:..., and audit the file again.",
            source=f"{_ARCHON}:1085",
            when=_IS_ARCHON,
        ),
        Recipe(
            note="AReaL's FSDP engine cannot train in FP16: it has no loss scaler. Use actor.backend = megatron:..., "
            "and audit the file again.",
            source="areal/engine/fsdp_engine.py:1288",
        ),
    ),
    irrelevant=(
        *(
            "ref.*",
            "critic.*",
            "teacher.*",
            "*.fp8_config.*",
            "*.fp8_param_gather",
            "*.moe_router_dtype",
            "actor.optimizer.*",
            "*.exp_avg*_dtype",
            "*.main_grads_dtype",
        ),
        *("sglang.*", "vllm.*", "actor.grad_reduce_dtype", "actor.optimizer_dtype"),
    ),
    other_versions={"allocation_mode": "before 1.0, whose allocation_mode chose the backends"},
)
