"""The doctor's verdicts: which precision is safe for a model, for what reasons, and which modules limit it.

    unsafe   a forward value is not finite, or no loss scale of 1 or more keeps the gradients finite with less than 1%
             of the non-zero FP32 gradients rounded to zero, or the pair of trainer and engine cannot be run
    watch    less than two bits of headroom, or the mismatch of the matched pair outside its band
    ok       neither

Every threshold is a constant of this module; docs/doctor.md lists them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from betterhalf.diagnostics.budget import ESS_FLOOR, Budget, predict_ess
from betterhalf.diagnostics.numerics import BACKWARD_KINDS, Census, ModuleRange, Spot
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.metrics.metric import Band
from betterhalf.types import DtypeName

MIN_HEADROOM_BITS = 2.0
"""Headroom below which the verdict is watch, because the next batch, or a few training steps, may overflow."""

MAX_ZEROED_FRACTION = 0.01
"""Share of the non-zero FP32 gradients that a precision may round to zero at its best loss scale; above it, unsafe."""

MIN_PREDICTED_ESS = ESS_FLOOR
"""Predicted share of effective samples at the configured response length below which the verdict is watch."""

BANDED_METRICS = ("k3/mean", "prob_gap/max", "prob_gap/min", "ess_fraction")
"""Mismatch metrics whose bands in `metrics.catalogue` decide; the others are too noisy in a small sample."""

MAX_AGREEING_K3 = 1e-6
"""Mean k3 of the FP32 pair, in nats, above which engine and trainer do not compute the same model."""

MAX_AGREEING_LOG_RATIO = 1e-2
"""Largest abs(log_ratio) of one token in the FP32 pair, in nats; above it, engine and trainer do not compute the same
model."""

MAX_MODULES = 10
"""Maximum number of modules that a verdict names."""

PREFERENCE: tuple[DtypeName, ...] = ("fp16", "bf16", "fp32")
"""Order in which precisions are recommended."""

VerdictName = Literal["ok", "watch", "unsafe"]

_RESIDUAL = re.compile(r"\.layers\.\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Verdict on one precision."""

    verdict: VerdictName
    """`ok`, `watch` or `unsafe`."""
    reasons: tuple[str, ...]
    """Sentences with the numbers; at least one."""
    modules: tuple[str, ...]
    """Modules that the reasons are about, worst first; empty when there are none."""

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as in `doctor.json`."""
        return {"verdict": self.verdict, "reasons": list(self.reasons), "modules": list(self.modules)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFinding:
    """Mismatch of one matched pair, or the reason why it could not be measured."""

    values: Mapping[str, float]
    """Mismatch metrics by name, without `mismatch/`; empty when the pair failed."""
    budget: Budget | None
    """Budget of the pair; None when it failed."""
    response_length: int
    """Configured length limit of a completion, where the effective sample size is predicted."""
    failure: str | None = None
    """Error of the trainer or the engine; None if the pair was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Agreement of engine and trainer in FP32, where rounding hardly matters."""

    agrees: bool
    """True if both compute the same model, or if this could not be measured."""
    reason: str
    """Sentences with the numbers."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as in `doctor.json`."""
        return {"agrees": self.agrees, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """One argument against a precision."""

    reason: str
    modules: tuple[str, ...] = ()


def judge(census: Census, pair: PairFinding | None) -> Verdict:
    """Return the verdict on one precision, from its range census and, if measured, the mismatch of its matched pair."""
    unsafe = [*_overflow(census), *_no_loss_scale(census), *_failure(census, pair)]
    if unsafe:
        return _verdict("unsafe", [*unsafe, *_prediction(census)])
    watch = [*_headroom(census), *_mismatch(pair)]
    if watch:
        return _verdict("watch", [*watch, *_prediction(census)])
    return Verdict(verdict="ok", reasons=tuple(_all_well(census, pair)), modules=())


def engine_agreement(pair: PairFinding | None) -> Agreement:
    """Return whether the FP32 pair is as close as FP32 rounding allows; a larger gap is a bug."""
    if pair is None or pair.failure is not None:
        return Agreement(agrees=True, reason=_unknown_agreement(pair))
    k3, largest = pair.values["k3/mean"], pair.values["log_ratio/max_abs"]
    numbers = f"in FP32 k3 is {k3:.2g} and the largest |log ratio| of a token {largest:.2g}"
    if k3 <= MAX_AGREEING_K3 and largest <= MAX_AGREEING_LOG_RATIO:
        return Agreement(agrees=True, reason=f"Engine and trainer compute the same model: {numbers}.")
    return Agreement(
        agrees=False,
        reason=f"BUG: engine and trainer do not compute the same model: {numbers}, where rounding explains at most "
        f"{MAX_AGREEING_K3:g} and {MAX_AGREEING_LOG_RATIO:g}. Find the operation that differs with "
        "`betterhalf probe MODEL --localize`.",
    )


def recommend(verdicts: Mapping[DtypeName, Verdict]) -> DtypeName:
    """Return the first of FP16 and BF16 that is `ok`, else the first to `watch`, else FP32, at twice the cost."""
    for wanted in ("ok", "watch"):
        for name in PREFERENCE[:2]:
            if name in verdicts and verdicts[name].verdict == wanted:
                return name
    return "fp32"


def overflowing(census: Census) -> tuple[Spot, ...]:
    """Return the spots that overflow: the first one, then those whose FP32 magnitude does not fit, worst first.

    They are forward spots if the forward pass is not finite, else backward spots; empty if both passes are finite.
    """
    first = census.first_forward or census.first_backward
    if first is None:
        return ()
    others = _tight(census, 0.0, backward=first.kind in BACKWARD_KINDS)
    return tuple(dict.fromkeys([first, *(row.spot for row in others)]))


def cramped(census: Census) -> tuple[Spot, ...]:
    """Return the spots with too little headroom: forward spots, then backward spots, each group worst first."""
    rows = [row for backward in (False, True) for row in _tight(census, MIN_HEADROOM_BITS, backward=backward)]
    return tuple(row.spot for row in rows)


def is_residual(spot: Spot) -> bool:
    """Return whether a spot is the output of a decoder layer, or the sum in its middle (the second norm's input)."""
    return bool(_RESIDUAL.search(spot.module)) or (spot.kind == "input" and "norm" in spot.module)


# -- unsafe


def _overflow(census: Census) -> list[_Finding]:
    """Return a finding on the first forward value that is not finite, with all modules that overflow."""
    first = census.first_forward
    if first is None:
        return []
    row = _row(census, first)
    reached = f" reaches {row.max_abs:.3g} in FP32 and" if row and math.isfinite(row.max_abs) else ""
    reason = (
        f"In the forward pass, {first}{reached} {_not_finite(census)} {census.dtype.upper()}, whose maximum is "
        f"{census.max:g}; it is the first such value."
    )
    return [_Finding(reason=reason, modules=tuple(spot.module for spot in overflowing(census)))]


def _no_loss_scale(census: Census) -> list[_Finding]:
    """Return a finding on gradients that overflow at every loss scale, or underflow at the best one."""
    if census.first_forward is not None:
        return []
    if census.first_backward is not None:
        return [_gradient_overflow(census, census.first_backward)]
    lost, safe = census.zeroed_fraction, census.largest_safe_loss_scale
    if lost is None or lost < MAX_ZEROED_FRACTION:
        return []
    reason = (
        f"In the backward pass, {lost:.1%} of the non-zero FP32 gradients round to zero in {census.dtype.upper()} even "
        f"at the largest safe loss scale, {_power(safe)}; the limit is {MAX_ZEROED_FRACTION:.0%}."
    )
    return [_Finding(reason=reason, modules=census.zeroed_modules)]


def _gradient_overflow(census: Census, first: Spot) -> _Finding:
    row = _row(census, first)
    reached = f" reaches {row.max_abs:.3g} in FP32 and" if row and math.isfinite(row.max_abs) else ""
    reason = (
        f"In the backward pass, {first}{reached} {_not_finite(census)} {census.dtype.upper()}, whose maximum is "
        f"{census.max:g}, although every forward value is finite: no loss scale of 1 or more keeps the gradients "
        "finite."
    )
    return _Finding(reason=reason, modules=tuple(spot.module for spot in overflowing(census)))


def _not_finite(census: Census) -> str:
    return "does not fit into" if census.predicted else "is not finite in"


def _prediction(census: Census) -> list[_Finding]:
    """Return the finding that no pass ran in this precision."""
    if census.predicted is None:
        return []
    reason = f"No pass ran in {census.dtype.upper()}; its range is predicted from FP32 magnitudes: {census.predicted}."
    return [_Finding(reason=reason)]


def _failure(census: Census, pair: PairFinding | None) -> list[_Finding]:
    if pair is None or pair.failure is None:
        return []
    reason = f"The matched pair cannot be run in {census.dtype.upper()}: {pair.failure.rstrip('.')}."
    return [_Finding(reason=reason)]


# -- watch


def _headroom(census: Census) -> list[_Finding]:
    """Return a finding for each pass, forward and backward at loss scale 1, with less than two bits of headroom."""
    found = []
    for direction, backward in (("In the forward pass,", False), ("In the backward pass at loss scale 1,", True)):
        low = _tight(census, MIN_HEADROOM_BITS, backward=backward)
        if low:
            worst = low[0]
            reason = (
                f"{direction} {worst.spot} reaches {worst.max_abs:.3g}, {worst.headroom_bits:.1f} bits below the "
                f"{census.dtype.upper()} maximum of {census.max:g}; at least {MIN_HEADROOM_BITS:g} bits are advised."
            )
            found.append(_Finding(reason=reason, modules=tuple(row.spot.module for row in low)))
    return found


def _mismatch(pair: PairFinding | None) -> list[_Finding]:
    """Return findings on metrics of the matched pair outside their bands, and on a low effective sample size."""
    if pair is None or pair.failure is not None:
        return []
    found = []
    for name in BANDED_METRICS:
        metric = CATALOGUE[f"mismatch/{name}"]
        value = pair.values.get(name)
        if value is not None and not metric.healthy(value):
            reason = f"{metric.name} of the matched pair is {value:.3g}, outside its band ({_band(metric.band)})."
            found.append(_Finding(reason=reason))
    if pair.budget is not None:
        ess = predict_ess(pair.budget, pair.response_length)
        if ess < MIN_PREDICTED_ESS:
            reason = (
                f"At {pair.response_length} tokens the predicted effective sample size is {ess:.2f} of the batch, "
                f"below {MIN_PREDICTED_ESS:g}; completions of up to {pair.budget.max_length:.0f} tokens stay above."
            )
            found.append(_Finding(reason=reason))
    return found


# -- ok


def _all_well(census: Census, pair: PairFinding | None) -> list[str]:
    forward = [row for row in census.ranges if not _is_backward(row)]
    worst = min(forward, key=lambda row: row.headroom_bits)
    reasons = [
        f"In the forward pass, {worst.spot} comes closest to the {census.dtype.upper()} maximum: {worst.max_abs:.3g}, "
        f"{worst.headroom_bits:.1f} bits of headroom."
    ]
    reasons += [finding.reason for finding in _prediction(census)]
    if not census.predicted and (census.loss_scale > 1.0 or census.zeroed_fraction_unscaled):
        reasons.append(
            "In the backward pass, gradients stay finite up to a loss scale of "
            f"{_power(census.largest_safe_loss_scale)}, where {census.zeroed_fraction or 0.0:.2%} of them round to "
            f"zero ({census.zeroed_fraction_unscaled or 0.0:.2%} without a loss scale)."
        )
    if pair is not None and pair.budget is not None:
        ess = predict_ess(pair.budget, pair.response_length)
        reasons.append(
            f"The mismatch of the matched pair is k3 {pair.values['k3/mean']:.2g}; predicted effective sample size "
            f"{ess:.2f} at {pair.response_length} tokens."
        )
    return reasons


def _verdict(name: VerdictName, findings: list[_Finding]) -> Verdict:
    modules = dict.fromkeys(module for finding in findings for module in finding.modules)
    reasons = tuple(finding.reason for finding in findings)
    return Verdict(verdict=name, reasons=reasons, modules=tuple(modules)[:MAX_MODULES])


def _row(census: Census, spot: Spot) -> ModuleRange | None:
    return next((row for row in census.ranges if row.spot == spot), None)


def _tight(census: Census, bits: float, *, backward: bool) -> list[ModuleRange]:
    """Return the rows of one direction with less headroom than `bits`, worst first.

    In the forward pass, the residual stream carries the outputs of its branches on, so its rows count only if no row of
    a branch has too little headroom.
    """
    low = [row for row in census.ranges if row.headroom_bits < bits and _is_backward(row) == backward]
    branches = [row for row in low if backward or not is_residual(row.spot)]
    return sorted(branches or low, key=lambda row: row.headroom_bits)


def _is_backward(row: ModuleRange) -> bool:
    return row.spot.kind in BACKWARD_KINDS


def _power(scale: float | None) -> str:
    return f"2^{math.log2(scale):.0f}" if scale else "none"


def _band(band: Band | None) -> str:
    lower, upper = band or (None, None)
    if lower is None:
        return f"at most {upper:g}"
    return f"at least {lower:g}" if upper is None else f"{lower:g} to {upper:g}"


def _unknown_agreement(pair: PairFinding | None) -> str:
    why = pair.failure if pair else "it was not measured"
    return f"Unknown: the FP32 pair gave no numbers ({(why or '').rstrip('.')})."
