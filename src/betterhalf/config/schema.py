"""Every setting of betterhalf: strict, frozen, torch-free; each field documented by the string below it.

A section named by a bare string, as in `precision=fp16`, sets the field that `shorthand` names.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from betterhalf.config.algorithm import AlgorithmConfig
from betterhalf.config.diagnostics import (
    DoctorConfig,
    EvaluateConfig,
    MismatchConfig,
    ProbeConfig,
    SanityConfig,
    WatchdogConfig,
    WatchdogLevel,
)
from betterhalf.config.engine import EngineConfig, NativeEngineConfig, SamplingConfig, VllmEngineConfig
from betterhalf.config.precision import LossScaleConfig, PrecisionConfig, PrecisionRoles
from betterhalf.config.ratio import RatioConfig
from betterhalf.config.section import Section

__all__ = [
    "AlgorithmConfig",
    "ArithmeticTask",
    "DoctorConfig",
    "EngineConfig",
    "EvaluateConfig",
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
    "RatioConfig",
    "RunConfig",
    "SamplingConfig",
    "SanityConfig",
    "Section",
    "TaskConfig",
    "TrainingConfig",
    "VllmEngineConfig",
    "WatchdogConfig",
    "WatchdogLevel",
]


class ModelConfig(Section):
    """Which model is trained."""

    shorthand: ClassVar[str | None] = "name"

    name: str = "demo"
    """Hugging Face name, local folder, GGUF file, or one of the two built in: `demo`, `smollm2`."""
    revision: str | None = None
    """Branch, tag or commit, when `name` is a hub name."""
    stop_tokens: tuple[str | int, ...] = ()
    """Tokens that end a completion, by text or id, such as `<|im_end|>`, instead of those that the model's files
    declare; empty: as declared (`eos_token_id` of its generation configuration and configuration, the tokenizer's
    `eos_token`)."""
    allow_no_stop_token: bool = False
    """Sample although no token ends a completion: all of them run to `sampling.max_tokens`."""


class ArithmeticTask(Section):
    """Arithmetic made up on the fly."""

    type: Literal["arithmetic"] = "arithmetic"
    style: Literal["running_sum", "word_problem", "auto"] = "running_sum"
    """`running_sum`: eight digits summed step by step, the demo model's task. `word_problem`: plain sentences for a
    chat model. `auto`: word problems if the tokenizer has a chat template, else running sums."""
    num_prompts: int = Field(4096, ge=1)
    """Size of the data set; the i-th prompt depends on `seed` and i alone."""
    seed: int = 0
    """Seed of the problems (not of the run)."""
    terms: int = Field(8, ge=2, le=16)
    """Digits in a running sum."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be used (too long, not encodable, an answer that cannot be met): stop before the run and name
    them, or leave them out and count them."""
    allow_changed_data: bool = False
    """Resume a run even if its rows, or the code of its reward, are not those it was started with."""


class MathTask(Section):
    """Problems with a checkable answer, from a JSONL file, graded by math-verify in worker processes."""

    type: Literal["math"] = "math"
    path: str
    """JSONL file with the fields `problem` and `answer`, or a data-set name on the Hugging Face hub."""
    split: str = "train"
    """Split, when `path` is a hub name."""
    template: Literal["chat", "r1_distill", "qwen_math", "none"] = "chat"
    """How the problem is put to the model: the tokenizer's chat template, or one of the paper's two templates."""
    reward_seconds: float = Field(10.0, gt=0)
    """Time limit for grading one completion; a time-out scores 0 and is counted."""
    reward_workers: int = Field(2, ge=1)
    """Worker processes that grade."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be used (too long, not encodable, an answer that cannot be met): stop before the run and name
    them, or leave them out and count them."""
    allow_changed_data: bool = False
    """Resume a run even if its rows, or the code of its reward, are not those it was started with."""


class PerfectibleTask(Section):
    """A perfectible set made earlier: only prompts that the base policy solves sometimes."""

    type: Literal["perfectible"] = "perfectible"
    path: str
    """`perfectible.jsonl` written by `betterhalf sanity`."""
    base: Annotated[ArithmeticTask | MathTask, Field(discriminator="type")] = ArithmeticTask()
    """The task whose prompts were filtered; it also gives the reward."""


TaskConfig = Annotated[ArithmeticTask | MathTask | PerfectibleTask, Field(discriminator="type")]


class OptimizerConfig(Section):
    """AdamW on FP32 master weights."""

    learning_rate: float = Field(1e-6, ge=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moment estimates."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator; states are FP32, where 1e-8 is not 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Global gradient norm is clipped to this, after unscaling."""
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; `linear` and `cosine` fall to `min_ratio` at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""


class TrainingConfig(Section):
    """Sizes of a step, and what is saved."""

    steps: int = Field(100, ge=1)
    """Steps of the run; each is one rollout batch."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts sampled in a step."""
    group_size: int = Field(8, ge=1)
    """Siblings of each prompt."""
    optimizer_steps: int = Field(4, ge=1)
    """Optimizer steps for each rollout batch (the paper: 4)."""
    tokens_per_micro_batch: int = Field(4096, ge=1)
    """Token budget of one forward-backward; a longer sequence gets a pack of its own."""
    logits_mib: int = Field(256, ge=1)
    """Memory for FP32 logits; logprobs are computed in chunks that fit, never for all tokens at once."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile_layers: bool = False
    """Compile the trainer's layers with torch.compile, which fuses norms, rope and SwiGLU; roundings to half are kept.
    The first steps take up to a minute longer. On a CPU it needs a C++ compiler."""
    checkpoint_every: int = Field(10, ge=0)
    """Steps between checkpoints; 0 saves only the last."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older checkpoints are deleted."""


class LoggingConfig(Section):
    """What is shown and kept."""

    console: Literal["auto", "live", "lines", "quiet"] = "auto"
    """`live` dashboard on a terminal, plain `lines` elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    rollouts_per_step: int = Field(2, ge=0)
    """Rollouts kept in `rollouts.jsonl` in each step, with per-token columns."""


class RunConfig(Section):
    """Everything that determines a run."""

    name: str = "run"
    """Names the run folder."""
    seed: int = Field(0, ge=0)
    """Seed of sampling, shuffling and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where trainer and engine live; `auto` takes a GPU when there is one."""
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
    probe: ProbeConfig = ProbeConfig()
    doctor: DoctorConfig = DoctorConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        rollouts = self.training.prompts_per_step * self.training.group_size
        if self.training.optimizer_steps > rollouts:
            raise ValueError(
                f"training.optimizer_steps={self.training.optimizer_steps} exceeds the {rollouts} rollouts of a step; "
                "lower it, or raise training.prompts_per_step"
            )
        return self
