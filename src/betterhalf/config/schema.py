"""The whole configuration: strict, frozen, torch-free; the string below each field documents it.

Each section has its own file in this package. Other packages import every section from here.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.algorithm import AlgorithmConfig
from betterhalf.config.data import DataConfig, PromptConfig, RowsConfig
from betterhalf.config.doctor import DoctorConfig
from betterhalf.config.engine import EngineConfig, NativeEngineConfig, VllmEngineConfig
from betterhalf.config.evaluate import EvaluateConfig
from betterhalf.config.kl import KlConfig
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
from betterhalf.config.watchdog import WatchdogConfig, WatchdogLevel
from betterhalf.types import DeviceName

__all__ = [
    "AlgorithmConfig",
    "ArithmeticTask",
    "BaseTaskConfig",
    "DataConfig",
    "DoctorConfig",
    "EngineConfig",
    "EnvironmentTask",
    "EvaluateConfig",
    "KlConfig",
    "LoggingConfig",
    "LossScaleConfig",
    "MathTask",
    "MismatchConfig",
    "ModelConfig",
    "NativeEngineConfig",
    "OptimizerConfig",
    "PerfectibleTask",
    "PrecisionConfig",
    "PrecisionRoles",
    "ProbeConfig",
    "PromptConfig",
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
    precision: PrecisionConfig = PrecisionConfig()
    engine: EngineConfig = NativeEngineConfig()
    task: TaskConfig = ArithmeticTask()
    sampling: SamplingConfig = SamplingConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
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
    def _sizes_fit(self) -> Self:
        rollouts = self.training.prompts_per_step * self.training.group_size
        if self.training.optimizer_steps > rollouts:
            raise ValueError(
                f"training.optimizer_steps={self.training.optimizer_steps} exceeds the {rollouts} rollouts of a step. "
                "Lower it, or raise training.prompts_per_step."
            )
        return self
