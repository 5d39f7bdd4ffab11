"""Loss scaling: keep FP16 gradients between underflow and overflow, and skip the steps that overflow.

    loss = scaler.scale_loss(loss); loss.backward()          each micro-batch
    report = scaler.unscale(gradients, max_norm=1.0)         FP32 gradients, in place
    if not report.found_inf: optimizer.step()
    scaler.update(report.found_inf)

BF16 and FP32 use the null scaler. Its scale is 1, and it still detects non-finite gradients, so callers need not know
which scaler they hold. The rule is that of torch.amp.GradScaler (arXiv 1710.03740), with a floor and DeepSpeed's two
kinds of hysteresis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from betterhalf.config.schema import LossScaleConfig
from betterhalf.distributed.world import ONE_RANK, Collective, reduce_over_ranks
from betterhalf.errors import CheckpointError, LossScaleError
from betterhalf.precision.formats import FORMATS
from betterhalf.precision.inspection import Inspection, inspect
from betterhalf.reduction import MAX, SUM
from betterhalf.types import DtypeName

_NORM_EPSILON = 1e-6
"""Added to the norm before it divides, as in torch.nn.utils.clip_grad_norm_."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnscaleReport:
    """Statistics of the accumulated gradients. Fractions refer to the scaled gradients, and to all ranks together."""

    found_inf: bool
    """True if a gradient on any rank is infinite or NaN: skip the optimizer step."""
    first_offender: str | None
    """First parameter, in the order given, with a non-finite gradient, on the first rank that has one; else None."""
    norm: float
    """L2 norm of all ranks' unscaled gradients together, before clipping; NaN with `found_inf`."""
    subnormal_fraction: float
    """Fraction of non-zero entries below the smallest normal number of the compute format."""
    zero_fraction: float
    """Fraction of entries that are zero: underflowed, or zero in exact arithmetic too."""
    overflow_fraction: float
    """Fraction of entries that are infinite or NaN."""


class LossScaler(Protocol):
    """Interface of a loss scaler, as the trainer uses it."""

    @property
    def scale(self) -> float:
        """Factor that multiplies the next loss."""
        ...

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the scaled loss; `loss` must be an FP32 scalar, since a half loss times 65536 is infinite."""
        ...

    def unscale(
        self,
        grads: Iterable[tuple[str, Tensor]],
        ranks: Collective = ONE_RANK,
        *,
        max_norm: float | None = None,
    ) -> UnscaleReport:
        """Divide FP32 gradients by the scale and clip their norm, in place; return their statistics.

        Args:
            grads: (name, float32 gradient) of this rank's shard, in a fixed order.
            ranks: all ranks of the trainer, so that all skip, clip and report alike.
            max_norm: maximum norm of all gradients together; None for no clipping.
        """
        ...

    def update(self, found_inf: bool) -> None:
        """Adapt the scale after an optimizer step that was applied, or skipped because of `found_inf`.

        Raises:
            LossScaleError: too many optimizer steps in a row were skipped, and the scale cannot fall further.
        """
        ...

    def state_dict(self) -> dict[str, float]:
        """Return everything a checkpoint needs; JSON represents it exactly."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the state belongs to another kind of scaler.
        """
        ...


class DynamicLossScaler:
    """Scaler for FP16: it grows after a number of clean optimizer steps and backs off on overflow."""

    def __init__(self, config: LossScaleConfig, compute_dtype: DtypeName) -> None:
        """Start at `config.initial`; `compute_dtype` defines which gradients count as subnormal."""
        self._config = config
        self._smallest_normal = FORMATS[compute_dtype].min_normal
        # Gradients cannot be divided by a scale of zero, so a configured floor of 0 is raised.
        self._floor = max(config.floor, FORMATS["fp32"].min_normal)
        self._scale = _to_fp32(config.initial)
        self._clean_steps = 0
        self._overflows = 0
        self._skips_at_floor = 0
        self._last_offender: str | None = None

    @property
    def scale(self) -> float:
        """Factor that multiplies the next loss, an FP32 number."""
        return self._scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return `loss` times the scale: float32 [] -> float32 []."""
        _require_scalar_fp32(loss)
        return loss * self._scale

    def unscale(
        self,
        grads: Iterable[tuple[str, Tensor]],
        ranks: Collective = ONE_RANK,
        *,
        max_norm: float | None = None,
    ) -> UnscaleReport:
        """See `LossScaler.unscale`."""
        report = _unscale(grads, self._scale, self._smallest_normal, max_norm, ranks)
        self._last_offender = report.first_offender or self._last_offender
        return report

    def update(self, found_inf: bool) -> None:
        """See `LossScaler.update`. With hysteresis h the scale falls from the h-th overflow on.

        Overflows are counted since the scale last grew or, with `consecutive_hysteresis`, since the last clean step.
        """
        if found_inf:
            self._after_overflow()
        else:
            self._after_clean_step()

    def _after_clean_step(self) -> None:
        self._skips_at_floor = 0
        self._clean_steps += 1
        grows = self._clean_steps == self._config.growth_interval
        if grows or self._config.consecutive_hysteresis:
            self._overflows = 0
        if grows:
            self._clean_steps = 0
            grown = _to_fp32(self._scale * self._config.growth_factor)
            self._scale = grown if math.isfinite(grown) else self._scale

    def _after_overflow(self) -> None:
        self._clean_steps = 0
        self._overflows += 1
        if self._scale <= self._floor:
            self._skips_at_floor += 1
        elif self._overflows >= self._config.hysteresis:
            self._scale = max(self._floor, _to_fp32(self._scale * self._config.backoff_factor))
        if self._skips_at_floor >= self._config.max_skips_at_floor:
            raise LossScaleError(
                f"gradients overflowed in {self._skips_at_floor} optimizer steps in a row with the loss scale at its "
                f"floor {self._scale:g}{_offender(self._last_offender)}; lower optimizer.learning_rate or "
                "optimizer.max_grad_norm, lower precision.loss_scale.floor, or use precision=bf16"
            )

    def state_dict(self) -> dict[str, float]:
        """Return the scale and the three counters."""
        return {
            "scale": self._scale,
            "clean_steps": self._clean_steps,
            "overflows": self._overflows,
            "skips_at_floor": self._skips_at_floor,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """See `LossScaler.load_state_dict`."""
        # Version 0.1 counted only consecutive overflows, under another name.
        state = {"overflows" if key == "overflows_in_row" else key: value for key, value in state.items()}
        _require_keys(state, self.state_dict())
        self._scale = float(state["scale"])
        self._clean_steps = int(state["clean_steps"])
        self._overflows = int(state["overflows"])
        self._skips_at_floor = int(state["skips_at_floor"])


class NullLossScaler:
    """Scaler for BF16 and FP32: its scale is always 1. It raises after too many non-finite gradients in a row."""

    scale: float = 1.0

    def __init__(self, config: LossScaleConfig, compute_dtype: DtypeName) -> None:
        """Use only `max_skips_at_floor` of `config`; `compute_dtype` defines which gradients count as subnormal."""
        self._max_skips = config.max_skips_at_floor
        self._smallest_normal = FORMATS[compute_dtype].min_normal
        self._skips_in_row = 0
        self._last_offender: str | None = None

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return `loss` itself."""
        _require_scalar_fp32(loss)
        return loss

    def unscale(
        self,
        grads: Iterable[tuple[str, Tensor]],
        ranks: Collective = ONE_RANK,
        *,
        max_norm: float | None = None,
    ) -> UnscaleReport:
        """See `LossScaler.unscale`; the gradients are only clipped."""
        report = _unscale(grads, 1.0, self._smallest_normal, max_norm, ranks)
        self._last_offender = report.first_offender or self._last_offender
        return report

    def update(self, found_inf: bool) -> None:
        """See `LossScaler.update`."""
        self._skips_in_row = self._skips_in_row + 1 if found_inf else 0
        if self._skips_in_row >= self._max_skips:
            raise LossScaleError(
                f"gradients were not finite in {self._skips_in_row} optimizer steps in a row"
                f"{_offender(self._last_offender)}; lower optimizer.learning_rate, or look for NaN in the weights"
            )

    def state_dict(self) -> dict[str, float]:
        """Return the number of skipped steps in a row."""
        return {"skips_in_row": self._skips_in_row}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """See `LossScaler.load_state_dict`."""
        _require_keys(state, self.state_dict())
        self._skips_in_row = int(state["skips_in_row"])


def build_loss_scaler(config: LossScaleConfig, compute_dtype: DtypeName) -> LossScaler:
    """Return a dynamic scaler for FP16, the null scaler for formats with the exponent range of FP32."""
    if FORMATS[compute_dtype].exponent_bits < FORMATS["fp32"].exponent_bits:
        return DynamicLossScaler(config, compute_dtype)
    return NullLossScaler(config, compute_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GradientTotals:
    """Sums over all gradients: of one rank's shard, and then of all ranks."""

    square: float = field(metadata=SUM)
    """Sum of squares of the scaled entries."""
    nonzero: float = field(metadata=SUM)
    """Number of non-zero entries."""
    small: float = field(metadata=SUM)
    """Number of non-zero entries below the compute format's smallest normal number."""
    broken: float = field(metadata=SUM)
    """Number of entries that are infinite or NaN."""
    entries: float = field(metadata=SUM)
    """Number of entries."""
    found_inf: float = field(metadata=MAX)
    """1 if an entry is infinite or NaN, else 0."""


@torch.no_grad()
def _unscale(
    grads: Iterable[tuple[str, Tensor]],
    scale: float,
    smallest_normal: float,
    max_norm: float | None,
    ranks: Collective,
) -> UnscaleReport:
    """Inspect the gradients, then unscale and clip them with one multiplication."""
    named = list(grads)
    for name, grad in named:
        assert grad.dtype == torch.float32, f"the accumulated gradient of {name} is {grad.dtype}, not FP32"
    tensors = [grad for _, grad in named]
    device = tensors[0].device if tensors else None
    found = inspect(tensors, smallest_normal)
    total = reduce_over_ranks(_totals(tensors, found), ranks, device)
    found_inf = total.found_inf > 0
    norm = math.nan if found_inf else math.sqrt(total.square) / scale
    clipped = 1.0 if max_norm is None or found_inf else min(1.0, max_norm / (norm + _NORM_EPSILON))
    if tensors and clipped / scale != 1.0:
        torch._foreach_mul_(tensors, clipped / scale)
    return UnscaleReport(
        found_inf=found_inf,
        first_offender=_first_offender([name for name, _ in named], found, ranks, device) if found_inf else None,
        norm=norm,
        subnormal_fraction=total.small / max(total.nonzero, 1),
        zero_fraction=(total.entries - total.nonzero) / max(total.entries, 1),
        overflow_fraction=total.broken / max(total.entries, 1),
    )


def _totals(tensors: list[Tensor], found: list[Inspection]) -> _GradientTotals:
    """Sum what was found in this rank's gradients."""
    return _GradientTotals(
        square=math.fsum(one.square for one in found),
        nonzero=sum(one.nonzero for one in found),
        small=sum(one.small for one in found),
        broken=sum(one.broken for one in found),
        entries=sum(grad.numel() for grad in tensors),
        found_inf=float(any(one.broken for one in found)),
    )


def _first_offender(
    names: list[str], found: list[Inspection], ranks: Collective, device: torch.device | None
) -> str | None:
    """Name the first parameter with a non-finite gradient, of the first rank that has one."""
    broken = [name for name, one in zip(names, found, strict=True) if one.broken]
    encoded = torch.tensor(list("".join(broken[:1]).encode()), dtype=torch.uint8, device=device)
    gathered = (bytes(values.tolist()).decode() for values in ranks.gather(encoded))
    return next((name for name in gathered if name), None)


def _require_scalar_fp32(loss: Tensor) -> None:
    assert loss.dtype == torch.float32 and loss.dim() == 0, (
        f"the loss must be an FP32 scalar before scaling, not {loss.dtype} {tuple(loss.shape)}"
    )


def _require_keys(state: dict[str, float], wanted: dict[str, float]) -> None:
    if state.keys() != wanted.keys():
        raise CheckpointError(
            f"the checkpoint's loss scaler has the keys {sorted(state)}, this run's has {sorted(wanted)}; "
            "resume with the precision of the run that wrote the checkpoint"
        )


def _offender(name: str | None) -> str:
    return f" (first in {name})" if name else ""


def _to_fp32(value: float) -> float:
    """Round a scale to FP32, as GradScaler does: it multiplies an FP32 loss."""
    return torch.tensor(value, dtype=torch.float64).float().item()
