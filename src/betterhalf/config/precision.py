"""The section `[precision]`: the dtype of every role, and loss scaling."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, get_args

from pydantic import Field, field_validator

from betterhalf.config.section import Section
from betterhalf.types import DtypeName, EmulatedDtype, HalfMatmul, PairSelection


class PrecisionRoles(Section):
    """The resolved dtype of each role; docs/vocabulary.md explains the roles."""

    master_dtype: DtypeName
    """The optimizer's weights and states."""
    compute_dtype: DtypeName
    """Forward and backward passes of the trainer."""
    wire_dtype: DtypeName
    """Weights on their way to the rollout engine."""
    rollout_dtype: DtypeName
    """Computation of the rollout engine."""
    kv_dtype: DtypeName
    """Keys and values in the engine's cache."""
    logits_dtype: DtypeName
    """Logits, and everything computed from them."""
    reduce_dtype: DtypeName
    """Accumulation of gradients over micro-batches and ranks."""


class LossScaleConfig(Section):
    """Loss scaling when `compute_dtype` is fp16; other formats are not scaled and use only `max_skips_at_floor`."""

    initial: float = Field(2.0**16, gt=0)
    """Initial loss scale."""
    growth_factor: float = Field(2.0, gt=1)
    """Factor on the scale after `growth_interval` clean optimizer steps."""
    backoff_factor: float = Field(0.5, gt=0, lt=1)
    """Factor on the scale when gradients overflow."""
    growth_interval: int = Field(400, ge=1)
    """Number of clean optimizer steps before the scale grows. A short RL run never reaches PyTorch's 2000."""
    floor: float = Field(1.0, ge=0)
    """Lower bound of the scale; 0 for none."""
    hysteresis: int = Field(1, ge=1)
    """Number of overflows before the scale falls; each skips its optimizer step. 1: it falls at every overflow."""
    consecutive_hysteresis: bool = False
    """With a `hysteresis` above 1, count overflows since the last clean step (true) or since the scale last grew
    (false, as in DeepSpeed). With true, a scale at which every second step overflows is never lowered."""
    max_skips_at_floor: int = Field(10, ge=1)
    """Number of consecutive skipped optimizer steps at the floor after which the run stops."""


_DTYPE = "|".join(get_args(DtypeName))

PairName = Annotated[str, Field(pattern=f"^({_DTYPE})/({_DTYPE})$")]
"""`TRAINER/ROLLOUT`."""

PAIR_NAMES = tuple(f"{train}/{rollout}" for train in get_args(DtypeName) for rollout in get_args(DtypeName))
"""All pairs."""

PrecisionPairs = PairSelection | tuple[PairName, ...]
"""(Trainer dtype, rollout dtype) pairs that the probe measures."""


def about_emulated(name: object) -> str:
    """Return a sentence on a name that looks like an emulated format but is none; empty for any other name."""
    names = get_args(EmulatedDtype)
    if name in names or re.fullmatch(r"e\d+m\d+", str(name)) is None:
        return ""
    same = f" {name} is bf16 itself." if name == "e8m7" else ""
    return f" Emulated formats have 8 exponent bits and 2 to 6 mantissa bits, {names[0]} to {names[-1]}.{same}"


class PrecisionConfig(Section):
    """One precision for trainer and engine; for an ablation, each role can be set alone."""

    shorthand: ClassVar[str | None] = "preset"

    preset: DtypeName = "fp16"
    """Compute, wire, rollout and KV dtype. `e8m2` to `e8m6` are emulated on a CPU: BF16, rounded once more to 2 to 6
    stored mantissa bits."""
    compute_dtype: DtypeName | None = None
    """Compute dtype of the trainer, if it differs from `preset`."""
    rollout_dtype: DtypeName | None = None
    """Dtype of the engine, if it differs from `preset`; wire and KV dtype follow it."""
    wire_dtype: DtypeName | None = None
    """Dtype of weights on their way to the engine, if it differs from the engine's."""
    kv_dtype: DtypeName | None = None
    """Dtype of the engine's KV cache, if it differs from the engine's."""
    allow_difference: bool = False
    """Run even if trainer and engine differ in precision (an ablation)."""
    half_matmul: HalfMatmul = "auto"
    """Half matrix products on a CPU: by the processor's half instructions (`native`), or with operands and results on
    the half grid and sums in FP32 (`fp32_sums`, as in tensor cores). `auto`: `native` for BF16 and emulated formats
    if the processor has BF16 instructions, else `fp32_sums`. A GPU always uses `native`."""
    fp32_modules: tuple[str, ...] = ()
    """FP32 islands: modules that trainer and engine compute in FP32 while the rest is half, by name or pattern, such as
    `model.layers.3`, `model.layers.*.mlp`, `model.layers.3.mlp.down_proj`, `model.layers.3.self_attn` or
    `model.layers.3.self_attn.o_proj`. Their weights stay on the half grid; their outputs are FP32, and so is the
    residual stream after them. `betterhalf doctor` recommends islands."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Loss scaling."""
    pairs: PrecisionPairs = "full"
    """Pairs that `probe` measures: every trainer dtype of fp16, bf16 and fp32 with every rollout dtype (`full`), equal
    ones only (`matched`), or a list of `TRAINER/ROLLOUT` such as `fp32/bf16,bf16/bf16` or `e8m3/e8m3`. `full` and
    `matched` include the pair of the run itself if it is emulated."""

    @field_validator("pairs", mode="before")
    @classmethod
    def _known_pairs(cls, value: Any) -> Any:
        names = value if isinstance(value, (list, tuple)) else (value,)
        if len(names) == 1 and names[0] in get_args(PairSelection):
            return names[0]
        if not names:
            raise ValueError(
                "precision.pairs is empty, so there is nothing to measure. Write full, matched, or a list such as "
                "precision.pairs=fp16/fp16,bf16/bf16."
            )
        for name in names:
            if name not in PAIR_NAMES:
                about = next(filter(None, map(about_emulated, str(name).split("/"))), "")
                raise ValueError(
                    f"precision.pairs = {name!r} is not full, matched or a list of TRAINER/ROLLOUT.{about} Write "
                    "a list such as precision.pairs=fp16/fp16,bf16/bf16."
                )
        return tuple(names)

    def roles(self) -> PrecisionRoles:
        """Return the dtype of every role; wire and KV dtype are the rollout dtype unless set."""
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
