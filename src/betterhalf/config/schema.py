"""Every setting of betterhalf: strict, frozen, torch-free; each field documented by the string below it.

A section named by a bare string, as in `precision=fp16`, sets the field that `shorthand` names.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from betterhalf.types import DtypeName, PresetName


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values cannot change, no silent coercion of strings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    shorthand: ClassVar[str | None] = None


class ModelConfig(Section):
    """Which model is trained."""

    shorthand: ClassVar[str | None] = "name"

    name: str = "demo"
    """Hugging Face name, local folder, GGUF file, or one of the two built in: `demo`, `smollm2`."""
    revision: str | None = None
    """Branch, tag or commit, when `name` is a hub name."""


class PrecisionRoles(Section):
    """Each dtype role, resolved; see DESIGN vocabulary."""

    master_dtype: DtypeName
    """Weights the optimizer holds, and its states."""
    compute_dtype: DtypeName
    """Forward and backward of the trainer."""
    wire_dtype: DtypeName
    """Weights on their way to the rollout engine."""
    rollout_dtype: DtypeName
    """Computation of the rollout engine."""
    kv_dtype: DtypeName
    """Keys and values the engine caches."""
    logits_dtype: DtypeName
    """Logits and everything after them."""
    reduce_dtype: DtypeName
    """Accumulation of gradients over micro-batches and ranks."""


class LossScaleConfig(Section):
    """Loss scaling when `compute_dtype` is fp16; other formats have no scale and use `max_skips_at_floor` alone."""

    initial: float = Field(2.0**16, gt=0)
    """First loss scale."""
    growth_factor: float = Field(2.0, gt=1)
    """Multiplies the scale after `growth_interval` clean optimizer steps."""
    backoff_factor: float = Field(0.5, gt=0, lt=1)
    """Multiplies the scale when gradients overflow."""
    growth_interval: int = Field(400, ge=1)
    """Clean optimizer steps before the scale grows. PyTorch's 2000 is never reached in a short RL run."""
    floor: float = Field(1.0, ge=0)
    """The scale never falls below this; 0 means no floor."""
    hysteresis: int = Field(1, ge=1)
    """Overflows in a row before the scale is lowered; the step is skipped each time."""
    max_skips_at_floor: int = Field(10, ge=1)
    """Skipped optimizer steps in a row at the floor before the run stops."""


class PrecisionConfig(Section):
    """One precision for both sides; roles can be set one by one for an ablation."""

    shorthand: ClassVar[str | None] = "preset"

    preset: DtypeName = "fp16"
    """Sets compute, wire, rollout and KV dtype at once."""
    compute_dtype: DtypeName | None = None
    """Override for the trainer."""
    rollout_dtype: DtypeName | None = None
    """Override for the engine; wire and KV follow it."""
    wire_dtype: DtypeName | None = None
    """Override for weights on the wire."""
    kv_dtype: DtypeName | None = None
    """Override for the engine's cache."""
    allow_difference: bool = False
    """Run although trainer and engine differ in precision (an ablation)."""
    half_matmul: Literal["auto", "native", "fp32_sums"] = "auto"
    """How half matrix products are computed on a CPU: by the processor's own half instructions (`native`), or with
    operands and results on the half grid and sums in FP32 (`fp32_sums`, as tensor cores do). `auto`: `fp32_sums` for
    FP16, `native` for BF16. On a GPU always native."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Loss scaling."""

    def roles(self) -> PrecisionRoles:
        """The dtype of every role; wire and KV follow the rollout dtype unless set."""
        rollout = self.rollout_dtype or self.preset
        return PrecisionRoles(
            master_dtype="fp32",
            compute_dtype=self.compute_dtype or self.preset,
            wire_dtype=self.wire_dtype or rollout,
            rollout_dtype=rollout,
            kv_dtype=self.kv_dtype or rollout,
            logits_dtype="fp32",
            reduce_dtype="fp32",
        )


class EngineConfig(Section):
    """The rollout engine."""

    shorthand: ClassVar[str | None] = "type"

    type: Literal["native"] = "native"
    """Which engine samples."""
    rounding: Literal["engine", "aligned"] = "engine"
    """`engine` rounds where production engines do; `aligned` rounds where the trainer does, which brings the two
    several times closer."""
    max_concurrent: int = Field(256, ge=1)
    """Sequences decoded at once: slots of the KV cache."""
    cuda_graphs: bool = True
    """On a GPU, capture decode steps as CUDA graphs."""


class SamplingConfig(Section):
    """How completions are drawn for training."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this, on both sides, before the log-softmax."""
    max_tokens: int = Field(64, ge=1)
    """Length limit of a completion."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Must stay 1 for training: the trainer does not apply the same truncation."""
    top_k: int = -1
    """Must stay -1 for training."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Must stay 0 for training."""

    @model_validator(mode="after")
    def _refuse_truncated_sampling(self) -> Self:
        for key, neutral in (("top_p", 1.0), ("top_k", -1), ("min_p", 0.0)):
            if getattr(self, key) != neutral:
                raise ValueError(
                    f"sampling.{key}={getattr(self, key)} truncates the distribution sampled from, but the trainer "
                    f"scores the whole one, which biases every importance ratio; set it to {neutral}"
                )
        return self


class ArithmeticTask(Section):
    """Arithmetic made up on the fly."""

    type: Literal["arithmetic"] = "arithmetic"
    style: Literal["running_sum", "word_problem"] = "running_sum"
    """`running_sum`: eight digits summed step by step, the demo model's task. `word_problem`: plain sentences for a
    chat model."""
    num_prompts: int = Field(4096, ge=1)
    """Size of the data set; the i-th prompt depends on `seed` and i alone."""
    seed: int = 0
    """Seed of the problems (not of the run)."""
    terms: int = Field(8, ge=2, le=16)
    """Digits in a running sum."""


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


class PerfectibleTask(Section):
    """A perfectible set made earlier: only prompts that the base policy solves sometimes."""

    type: Literal["perfectible"] = "perfectible"
    path: str
    """`perfectible.jsonl` written by `betterhalf sanity`."""
    base: Annotated[ArithmeticTask | MathTask, Field(discriminator="type")] = ArithmeticTask()
    """The task whose prompts were filtered; it also gives the reward."""


TaskConfig = Annotated[ArithmeticTask | MathTask | PerfectibleTask, Field(discriminator="type")]


class RatioConfig(Section):
    """How one importance ratio enters the loss. Bounds are bounds of the ratio itself (0.8 to 1.28, not 0.2 / 0.28)."""

    shorthand: ClassVar[str | None] = "level"

    level: Literal["none", "token", "sequence", "geometric_mean"]
    """Per token; product over the sequence; geometric mean over the sequence; or no ratio (1)."""
    ratio: Literal["current/proximal", "current/behavior", "proximal/behavior"] = "current/proximal"
    """Numerator and denominator."""
    treatment: Literal["raw", "truncate", "mask", "clip"] = "raw"
    """As it is; cap at `upper`; drop outside [lower, upper]; PPO's two-sided clip."""
    lower: float | None = None
    """Lower bound of the ratio; none if absent."""
    upper: float | None = None
    """Upper bound of the ratio; none if absent."""
    keep_weight: bool = True
    """With `mask`: multiply what is kept by its ratio (true), or only mask (false)."""
    gradient: Literal["ratio", "score"] = "ratio"
    """Differentiate the ratio itself, or hold it constant and differentiate log pi."""
    dual_clip: float | None = None
    """Bound on the loss of negative advantages, as a multiple of the advantage (arXiv 1912.09729)."""
    probability_gap: float | None = None
    """Drop a token when the update moves pi away from mu and abs(pi - mu) exceeds this (arXiv 2602.04879); beside any
    treatment but `clip`."""


class AlgorithmConfig(Section):
    """A preset, and any of its choices replaced."""

    shorthand: ClassVar[str | None] = "preset"

    preset: PresetName = "grpo"
    """Starting point; docs/algorithms.md gives each formula."""
    advantage: Literal["group_mean", "group_standardised", "leave_one_out", "raw"] | None = None
    """Baseline subtracted from the reward."""
    surrogate: RatioConfig | None = None
    """The ratio that multiplies the advantage."""
    correction: RatioConfig | None = None
    """The proximal/behavior ratio that corrects for the mismatch; `level = "none"` switches it off."""
    aggregation: Literal["constant_length", "sequence_mean", "token_mean"] | None = None
    """How token losses become one number."""
    denominator: Literal["all", "kept"] | None = None
    """`all`: fixed before masking, as in the paper. `kept`: rejected tokens leave the denominator."""
    dynamic_sampling: bool | None = None
    """Replace groups whose rewards are all equal by fresh prompts (DAPO, arXiv 2503.14476)."""
    max_sampling_rounds: int = Field(3, ge=1)
    """Rounds of generation in a step with `dynamic_sampling`."""
    overlong_buffer: int | None = None
    """Soft penalty over the last so many tokens before the length limit (DAPO); none if absent or 0."""


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
    """Memory for FP32 logits; logprobs are computed in chunks of rows that fit, never for all tokens at once."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: int = Field(10, ge=0)
    """Steps between checkpoints; 0 saves only the last."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older checkpoints are deleted."""


class MismatchConfig(Section):
    """Measurement of the gap between trainer and engine."""

    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the step's packs that is measured; a seeded sample when below 1."""


class EvaluateConfig(Section):
    """How `evaluate` samples."""

    samples: int = Field(8, ge=1)
    """Completions of each prompt: the k of avg@k and pass@k."""
    max_prompts: int | None = Field(None, ge=1)
    """Evaluate on the first so many prompts; all if absent."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""


class SanityConfig(Section):
    """The paper's sanity test: a perfectible set, then one arm for each precision."""

    arms: tuple[DtypeName, ...] = Field(("fp16", "bf16"), min_length=1)
    """Precisions to run; the first decides the exit status."""
    candidates: int = Field(320, ge=1)
    """Prompts tried for the perfectible set."""
    samples: int = Field(40, ge=1)
    """Completions of each candidate by the base policy (the paper: 40)."""
    lower: float = Field(0.2, ge=0, le=1)
    """Keep prompts solved at least this often."""
    upper: float = Field(0.8, ge=0, le=1)
    """Keep prompts solved at most this often."""
    pass_accuracy: float = Field(0.95, ge=0, le=1)
    """Final accuracy an arm must reach."""
    evaluation_samples: int = Field(8, ge=1)
    """Completions of each prompt in the final evaluation (avg@8)."""

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"sanity.arms={','.join(self.arms)} names an arm twice; name each precision once")
        if self.lower > self.upper:
            raise ValueError(f"sanity.lower={self.lower} exceeds sanity.upper={self.upper}; swap them")
        return self


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
    engine: EngineConfig = EngineConfig()
    task: TaskConfig = ArithmeticTask()
    sampling: SamplingConfig = SamplingConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mismatch: MismatchConfig = MismatchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sanity: SanityConfig = SanityConfig()
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
