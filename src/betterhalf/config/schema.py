"""The whole configuration: strict, frozen, torch-free; the string below each field documents it.

Each section has its own file in this package. Other packages import every section from here.
"""

from __future__ import annotations

from typing import Self, get_args

from pydantic import Field, model_validator

from betterhalf.config.algorithm import AlgorithmConfig
from betterhalf.config.cluster import ClusterConfig, EngineActorsConfig, PipelineConfig, TrainerRanksConfig
from betterhalf.config.data import DataConfig, PromptConfig, RowsConfig
from betterhalf.config.doctor import DoctorConfig
from betterhalf.config.engine import EngineConfig, NativeEngineConfig, PythonEngineConfig, VllmEngineConfig
from betterhalf.config.evaluate import EvaluateConfig
from betterhalf.config.kl import KlConfig
from betterhalf.config.lora import LoraConfig
from betterhalf.config.mismatch import MismatchConfig
from betterhalf.config.model import ModelConfig
from betterhalf.config.optimizer import OptimizerConfig
from betterhalf.config.precision import LossScaleConfig, PrecisionConfig, PrecisionRoles
from betterhalf.config.probe import ProbeConfig
from betterhalf.config.ratio import RatioConfig
from betterhalf.config.run_logging import LoggingConfig
from betterhalf.config.sampling import SamplingConfig
from betterhalf.config.sanity import SanityConfig
from betterhalf.config.section import Section
from betterhalf.config.sweep import SweepConfig
from betterhalf.config.task import (
    ArithmeticTask,
    BaseTaskConfig,
    MathTask,
    PerfectibleTask,
    ReasoningGymTask,
    TaskConfig,
)
from betterhalf.config.task_environment import EnvironmentTask
from betterhalf.config.task_python import PythonTask, RewardTerm
from betterhalf.config.training import TrainingConfig
from betterhalf.config.transfer import chosen_transfer, transfer_refusal
from betterhalf.config.watchdog import WatchdogConfig, WatchdogLevel
from betterhalf.types import DeviceName, EmulatedDtype, TransferName
from betterhalf.words import counted

__all__ = [
    "AlgorithmConfig",
    "ArithmeticTask",
    "BaseTaskConfig",
    "ClusterConfig",
    "DataConfig",
    "DoctorConfig",
    "EngineActorsConfig",
    "EngineConfig",
    "EnvironmentTask",
    "EvaluateConfig",
    "KlConfig",
    "LoggingConfig",
    "LoraConfig",
    "LossScaleConfig",
    "MathTask",
    "MismatchConfig",
    "ModelConfig",
    "NativeEngineConfig",
    "OptimizerConfig",
    "PerfectibleTask",
    "PipelineConfig",
    "PrecisionConfig",
    "PrecisionRoles",
    "ProbeConfig",
    "PromptConfig",
    "PythonEngineConfig",
    "PythonTask",
    "RatioConfig",
    "ReasoningGymTask",
    "RewardTerm",
    "RowsConfig",
    "RunConfig",
    "SamplingConfig",
    "SanityConfig",
    "Section",
    "SweepConfig",
    "TaskConfig",
    "TrainerRanksConfig",
    "TrainingConfig",
    "VllmEngineConfig",
    "WatchdogConfig",
    "WatchdogLevel",
]


class RunConfig(Section):
    """Everything that determines a run."""

    name: str = "run"
    """Name of the run; part of the name of its folder."""
    seed: int = Field(0, ge=0)
    """Seed of sampling, shuffling and data order."""
    device: DeviceName = "auto"
    """Device of trainer and engine; `auto` takes a GPU if there is one."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    precision: PrecisionConfig = PrecisionConfig()
    engine: EngineConfig = NativeEngineConfig()
    task: TaskConfig = ArithmeticTask()
    sampling: SamplingConfig = SamplingConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = ClusterConfig()
    pipeline: PipelineConfig = PipelineConfig()
    mismatch: MismatchConfig = MismatchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sanity: SanityConfig = SanityConfig()
    sweep: SweepConfig = SweepConfig()
    probe: ProbeConfig = ProbeConfig()
    doctor: DoctorConfig = DoctorConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def exact(self) -> bool:
        """True if trainer and engine must give the same bits."""
        return self.engine.exact

    @model_validator(mode="after")
    def _exact_fits(self) -> Self:
        if self.exact and self.training.compile_layers:
            raise ValueError(
                "engine.rounding=exact needs the same operations in trainer and engine, and training.compile_layers "
                "fuses the trainer's. Set training.compile_layers=false, or engine.rounding=aligned."
            )
        if self.exact and self.precision.half_matmul == "native":
            raise ValueError(
                "engine.rounding=exact needs half products with FP32 sums, and precision.half_matmul=native asks for "
                "the processor's. Leave out precision.half_matmul, or set engine.rounding=aligned."
            )
        return self

    @model_validator(mode="after")
    def _lora_fits(self) -> Self:
        if self.exact and self.lora.active:
            raise ValueError(
                "engine.rounding=exact needs the same operations in trainer and engine, and with lora.rank="
                f"{self.lora.rank} the trainer multiplies by base and adapter one after the other. Set lora.rank=0, or "
                "engine.rounding=aligned."
            )
        if self.training.compile_layers and self.lora.active:
            raise ValueError(
                f"training.compile_layers cannot trace the layers of PEFT that lora.rank={self.lora.rank} puts into "
                "the model. Set training.compile_layers=false, or lora.rank=0."
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        rollouts = self.training.prompts_per_step * self.training.group_size
        if self.training.optimizer_steps > rollouts:
            raise ValueError(
                f"training.optimizer_steps={self.training.optimizer_steps} exceeds the {counted(rollouts, 'rollout')} "
                "of a step. Lower it, or raise training.prompts_per_step."
            )
        return self

    @model_validator(mode="after")
    def _processes_have_work(self) -> Self:
        prompts = self.training.prompts_per_step
        rollouts = prompts * self.training.group_size // self.training.optimizer_steps
        if self.cluster.trainers > rollouts:
            raise ValueError(
                f"cluster.trainers={self.cluster.trainers} exceeds the {counted(rollouts, 'rollout')} of an optimizer "
                "step, so some ranks would never have a token. Lower cluster.trainers or training.optimizer_steps, or "
                "raise training.prompts_per_step."
            )
        if self.cluster.engines > prompts:
            raise ValueError(
                f"cluster.engines={self.cluster.engines} exceeds the {counted(prompts, 'prompt')} of a step, and one "
                "engine samples all completions of a prompt, so some engines would never have work. Lower "
                "cluster.engines, or raise training.prompts_per_step."
            )
        compute = self.precision.roles().compute_dtype
        if self.cluster.trainers > 1 and compute in get_args(EmulatedDtype):
            raise ValueError(
                f"cluster.trainers={self.cluster.trainers} shards the weights, and FSDP2 cannot gather them in the "
                f"emulated format {compute}. Set cluster.trainers=1, or precision=fp16, bf16 or fp32."
            )
        return self

    @model_validator(mode="after")
    def _devices_fit(self) -> Self:
        gpus = self.cluster.engine.gpus
        if self.device == "cpu" and self.cluster.needed_gpus > 0:
            raise ValueError(
                "device=cpu contradicts cluster.trainer.gpus and cluster.engine.gpus. Set both to 0, or device=cuda."
            )
        shards = self.engine.devices
        if (gpus > 1 or (gpus > 0 and shards > 1)) and gpus != shards:
            raise ValueError(
                f"cluster.engine.gpus={gpus:g} does not fit an engine that uses {counted(shards, 'GPU')}. Set "
                f"cluster.engine.gpus={shards}, or engine=vllm with engine.tensor_parallel_size={int(max(gpus, 1))}."
            )
        return self

    @model_validator(mode="after")
    def _transfer_fits(self) -> Self:
        refusal = transfer_refusal(self.cluster, self.engine)
        if refusal is not None:
            raise ValueError(refusal)
        return self

    @property
    def transfer(self) -> TransferName:
        """Path of the weights from the ranks to the engines; meaningful with `cluster.backend=ray`."""
        return chosen_transfer(self.cluster, self.engine)

    @model_validator(mode="after")
    def _pipeline_fits(self) -> Self:
        if self.pipeline.max_staleness and (self.cluster.backend == "local" or self.cluster.placement == "colocated"):
            raise ValueError(
                f"pipeline.max_staleness={self.pipeline.max_staleness} samples while the trainer learns, which needs "
                "engines with devices of their own. Set cluster.backend=ray and cluster.placement=separate, or "
                "pipeline.max_staleness=0."
            )
        return self
