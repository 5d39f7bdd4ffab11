"""Settings of precision: the dtype of every role, and loss scaling."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, get_args

from pydantic import Field, field_validator

from betterhalf.config.section import Section
from betterhalf.types import DtypeName, HalfMatmul, PairSelection


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
    """Overflows that it takes to lower the scale; the step is skipped each time. 1 lowers it at every overflow."""
    consecutive_hysteresis: bool = False
    """With a `hysteresis` above 1, count overflows from the last clean step on (true), or from the last growth of the
    scale on (false, as in DeepSpeed). With true a scale under which every second step overflows is never lowered."""
    max_skips_at_floor: int = Field(10, ge=1)
    """Skipped optimizer steps in a row at the floor before the run stops."""


_DTYPE = "|".join(get_args(DtypeName))

PairName = Annotated[str, Field(pattern=f"^({_DTYPE})/({_DTYPE})$")]
"""`TRAINER/ROLLOUT`."""

PAIR_NAMES = tuple(f"{train}/{rollout}" for train in get_args(DtypeName) for rollout in get_args(DtypeName))
"""All nine."""

PrecisionPairs = PairSelection | tuple[PairName, ...]
"""Which (trainer dtype, rollout dtype) pairs the probe measures."""


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
    half_matmul: HalfMatmul = "auto"
    """How half matrix products are computed on a CPU: by the processor's own half instructions (`native`), or with
    operands and results on the half grid and sums in FP32 (`fp32_sums`, as tensor cores do). `auto`: `fp32_sums` for
    FP16, `native` for BF16. On a GPU always native."""
    fp32_modules: tuple[str, ...] = ()
    """FP32 islands: modules that compute in FP32 on both sides although the rest is half, by name or pattern:
    `model.layers.3`, `model.layers.*.mlp`, `model.layers.3.mlp.down_proj`, `model.layers.3.self_attn`,
    `model.layers.3.self_attn.o_proj`. Their weights stay on the half grid; what they hand on is FP32, and so is the
    residual stream from there on. `betterhalf doctor` proposes them."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Loss scaling."""
    pairs: PrecisionPairs = "full"
    """What `probe` measures: every trainer dtype with every rollout dtype (`full`), only equal ones (`matched`), or a
    list of `TRAINER/ROLLOUT` such as `fp32/bf16,bf16/bf16`."""

    @field_validator("pairs", mode="before")
    @classmethod
    def _known_pairs(cls, value: Any) -> Any:
        names = value if isinstance(value, (list, tuple)) else (value,)
        if len(names) == 1 and names[0] in get_args(PairSelection):
            return names[0]
        if not names:
            raise ValueError(
                "precision.pairs is empty, so there is nothing to measure; write full, matched, or "
                "precision.pairs=fp16/fp16,bf16/bf16, for example"
            )
        for name in names:
            if name not in PAIR_NAMES:
                raise ValueError(
                    f"precision.pairs = {name!r} is neither full nor matched nor a list of TRAINER/ROLLOUT; write "
                    "precision.pairs=fp16/fp16,bf16/bf16, for example"
                )
        return tuple(names)

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
