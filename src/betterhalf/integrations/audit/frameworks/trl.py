"""Rules for TRL's GRPOTrainer and AsyncGRPOTrainer, read from the wheel of 1.16.0."""

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
    Starts,
    Trap,
)
from betterhalf.integrations.audit.words import CHECKPOINT

_VLLM = "trl/generation/vllm_generation.py"
_GRPO = "trl/trainer/grpo_trainer.py"
_USES_VLLM = Is("use_vllm", ("true",), "false")
_SERVER = (_USES_VLLM, Is("vllm_mode", ("server",), "colocate"))
_COLOCATED = (_USES_VLLM, Is("vllm_mode", ("colocate",), "colocate"))
_ASYNC_KEYS = ("max_inflight_tasks", "max_staleness", "weight_sync_steps", "queue_maxsize", "fork_threshold_tokens")
"""Keys of AsyncGRPOConfig that GRPOConfig lacks."""
_IS_ASYNC = (Is("trainer", ("AsyncGRPOTrainer",)),)
_ASYNC = "trl/experimental/async_grpo"
_FP16 = (Is("fp16", ("true",), "false"),)
_BF16 = (Is("bf16", ("true",), "true"),)

FRAMEWORK = Framework(
    name="trl",
    title="TRL",
    versions=("1.16.0",),
    repository="https://github.com/huggingface/trl",
    kinds=("yaml", "json", "shell"),
    marks=(
        *("num_generations", "max_completion_length", "use_vllm", "vllm_mode", "vllm_importance_sampling_correction"),
        *("reward_funcs", "cast_lm_head_to_fp32", "importance_sampling_level"),
        *_ASYNC_KEYS,
    ),
    commands=("*grpo.py",),
    choices=(
        Choice("use_vllm", ("true", "false"), "false"),
        Choice("vllm_mode", ("colocate", "server"), "colocate"),
    ),
    implied=(
        *(Implied((Has(key),), "trainer", "AsyncGRPOTrainer") for key in _ASYNC_KEYS),
        Implied((Starts(("*async_grpo*",)),), "trainer", "AsyncGRPOTrainer"),
    ),
    rules=(
        Rule(
            "compute", Fixed("fp16"), "transformers' Trainer autocasts to FP16", "trl/trainer/base_config.py:108", _FP16
        ),
        Rule(
            "compute",
            Fixed("bf16"),
            "bf16 is true unless fp16 is, and the Trainer autocasts to BF16",
            "trl/trainer/base_config.py:108",
            _BF16,
        ),
        Rule(
            "compute",
            FromKey("dtype", Fixed("fp32")),
            "no autocast: the model computes as it was loaded",
            f"{_GRPO}:171",
        ),
        Rule(
            "masters",
            FromKey("model_init_kwargs.dtype", Fixed("fp32"), {"auto": CHECKPOINT}),
            "the model is loaded in this dtype, and autocast keeps its parameters",
            "trl/trainer/utils.py:1332",
            (Has("model_init_kwargs.dtype"),),
        ),
        Rule(
            "masters",
            FromKey("dtype", Fixed("fp32"), {"auto": CHECKPOINT}),
            "the model is loaded in this dtype, FP32 by default, and autocast keeps its parameters",
            "trl/trainer/model_config.py:89",
        ),
        Rule(
            "reduction",
            Depends("the accelerate configuration; with DDP it is the dtype of the master weights"),
            "GRPOConfig has no key for it",
            _GRPO,
        ),
        Rule(
            "wire",
            Like("masters"),
            "parameters are sent as they are stored",
            f"{_ASYNC}/async_grpo_trainer.py:1351",
            _IS_ASYNC,
        ),
        Rule(
            "wire", Like("masters"), "parameters are sent one by one as they are stored", f"{_VLLM}:501", (_USES_VLLM,)
        ),
        Rule("wire", Like("masters"), "the trainer's own module samples, so no weight travels", f"{_GRPO}:1790"),
        Rule(
            "engine",
            Depends("--dtype of vllm serve; without it, on the checkpoint's dtype"),
            "the server is started apart from the trainer, which compares its dtype with that of the weights it sends, "
            "and only warns",
            f"{_ASYNC}/weight_transfer.py:83",
            _IS_ASYNC,
        ),
        Rule(
            "engine",
            CHECKPOINT,
            "colocated vLLM is built without a dtype, and GRPOConfig has no key for it; fp16 does not reach it",
            f"{_VLLM}:347",
            _COLOCATED,
        ),
        Rule(
            "engine",
            Depends("--dtype of trl vllm-serve; without it, on the checkpoint's dtype"),
            "the server is started apart from the trainer",
            "trl/scripts/vllm_serve.py:242",
            _SERVER,
        ),
        Rule("engine", Like("compute"), "without vLLM the trainer's own module samples", f"{_GRPO}:1790"),
        Rule(
            "kv",
            Depends("--kv-cache-dtype of vllm serve; without it, the engine's dtype"),
            "the server is started apart from the trainer",
            f"{_ASYNC}/async_grpo_trainer.py:1354",
            _IS_ASYNC,
        ),
        Rule(
            "kv",
            Depends("--kv-cache-dtype of trl vllm-serve; without it, the engine's dtype"),
            "the server is started apart from the trainer",
            "trl/scripts/vllm_serve.py:244",
            _SERVER,
        ),
        Rule("kv", Like("engine"), "the cache has the engine's dtype", f"{_VLLM}:347"),
        Rule(
            "logits",
            Like("compute"),
            "the fused LM head multiplies in the dtype of autocast",
            "trl/kernels/chunked_logprob.py:330",
            _IS_ASYNC,
        ),
        Rule(
            "logits",
            Fixed("fp32"),
            "the LM head is kept and multiplied in FP32, in the trainer alone",
            f"{_GRPO}:1012",
            (Is("cast_lm_head_to_fp32", ("true",), "false"),),
        ),
        Rule("logits", Like("compute"), "the LM head runs under autocast", f"{_GRPO}:1012"),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "the fused LM head sums the softmax in FP32",
            "trl/kernels/chunked_logprob.py:341",
            _IS_ASYNC,
        ),
        Rule(
            "logprobs",
            Fixed("fp32"),
            "accelerate converts the outputs of an autocast forward pass to FP32 before the log-softmax",
            "trl/trainer/utils.py:582",
            (Decided("compute", ("fp16", "bf16")),),
        ),
        Rule("logprobs", Like("logits"), "log-softmax in the logits' dtype", "trl/trainer/utils.py:582"),
        Rule(
            "scaler",
            Fixed("dynamic"),
            "accelerate's GradScaler starts at 65536",
            "trl/trainer/base_config.py:36",
            _FP16,
        ),
        Rule("scaler", Fixed("none"), "only FP16 is scaled", "trl/trainer/base_config.py:36"),
    ),
    traps=(
        Trap(
            "fp16 and bf16 are both set, which transformers refuses",
            "transformers.TrainingArguments",
            (*_FP16, Is("bf16", ("true",))),
            breaks=True,
        ),
        Trap(
            "the trainer compares the server's dtype with that of the weights it sends, which are FP32, and advises "
            "dtype = float16 for a server in FP16: do not follow it, because GradScaler refuses FP16 master weights",
            f"{_ASYNC}/weight_transfer.py:87",
            (*_IS_ASYNC, *_FP16, Decided("masters", ("fp32",))),
        ),
        Trap(
            "fp16 sets the trainer alone: colocated vLLM takes the checkpoint's dtype, BF16 for most checkpoints, "
            "without a message",
            f"{_VLLM}:347",
            (*_COLOCATED, *_FP16),
        ),
        Trap(
            "GradScaler refuses to unscale gradients of FP16 master weights: training ends at the first optimizer step",
            "torch.amp.GradScaler",
            (*_FP16, Decided("masters", ("fp16",))),
            breaks=True,
        ),
        Trap(
            "cast_lm_head_to_fp32 raises the precision of the trainer's head alone; vLLM keeps its own",
            f"{_GRPO}:1012",
            (_USES_VLLM, Is("cast_lm_head_to_fp32", ("true",), "false")),
        ),
    ),
    recipes=(
        Recipe(
            (("fp16", "true"),),
            "Start the server with `vllm serve MODEL --dtype float16`; the trainer's warning about it has no effect.",
            f"{_ASYNC}/weight_transfer.py:83",
            _IS_ASYNC,
        ),
        Recipe(
            (("fp16", "true"),),
            "Start the server with `trl vllm-serve --model MODEL --dtype float16`: the trainer does not compare it.",
            "trl/scripts/vllm_serve.py:242",
            _SERVER,
        ),
        Recipe(
            (("fp16", "true"), ("vllm_mode", "server")),
            "Colocated vLLM has no key for its dtype: start a server with `trl vllm-serve --model MODEL --dtype "
            "float16`, or save the checkpoint in FP16 first, so that vLLM's `auto` is FP16.",
            f"{_VLLM}:347",
            _COLOCATED,
        ),
        Recipe((("fp16", "true"),), "", "trl/trainer/base_config.py:108"),
    ),
    irrelevant=(
        *("fp16_*", "bf16_*", "half_precision_backend", "tf32", "*bnb_4bit*", "ddp_*", "reward_*", "dtype"),
        "model_init_kwargs.dtype",
    ),
)
