"""Compare two computations of one decoder, operation by operation, and distinguish faults from rounding.

If both sides compute an operation from bitwise identical inputs, its results differ by its own roundings alone. Each
rounding to a format with unit roundoff u changes a value by at most a factor of 1 + u, and the sums before it are in
FP32 on both sides. The relative error of a token's row, |result - reference| / |reference| in the Euclidean norm,
therefore stays below

    bound = (n_result + n_reference) * u  +  SUM_FACTOR * sqrt(K) * 2^-24  +  underflow

where n is the number of roundings on each side (`ROUNDINGS`; docs/engines.md lists the points), K is the length of the
longest sum, and underflow is what rounding among subnormal numbers may add. In healthy models roundings are random, and
the error reaches half of the bound. A fault of 1% exceeds the bound of every operation in FP16 and FP32; in BF16, three
roundings already allow 1.2%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from betterhalf.precision.formats import FORMATS
from betterhalf.types import DtypeName

Place = tuple[str, int | None]
"""(operation, layer); the layer is None outside of layers."""

Trace = Mapping[Place, Tensor]
"""Result [T, ...] of every operation for the T tokens of one sequence, in the order of computation."""

Side = Literal["trainer", "engine", "aligned"]
"""Rounding points of one side: the transformers module's, or the native engine's in one mode of `engine.rounding`."""

SUM_FACTOR = 64.0
"""Allowed error of a sum of K terms, in units of sqrt(K) FP32 roundings: it leaves room for cancellation and other
orders of summation. Healthy models reach 3; 64 is still below 0.1% for sums of 50,000 terms."""

ROUNDINGS: dict[str, dict[Side, int]] = {
    "embedding": {"trainer": 0, "engine": 0, "aligned": 0},
    "attention_norm": {"trainer": 2, "engine": 1, "aligned": 2},
    "queries": {"trainer": 1, "engine": 1, "aligned": 1},
    "keys": {"trainer": 1, "engine": 1, "aligned": 1},
    "values": {"trainer": 1, "engine": 1, "aligned": 1},
    "rotated_queries": {"trainer": 3, "engine": 1, "aligned": 3},
    "rotated_keys": {"trainer": 3, "engine": 1, "aligned": 3},
    "attention": {"trainer": 2, "engine": 2, "aligned": 2},
    "attention_output": {"trainer": 1, "engine": 1, "aligned": 1},
    "attention_residual": {"trainer": 1, "engine": 1, "aligned": 1},
    "mlp_norm": {"trainer": 2, "engine": 1, "aligned": 2},
    "gate_up": {"trainer": 1, "engine": 1, "aligned": 1},
    "swiglu": {"trainer": 2, "engine": 1, "aligned": 2},
    "down": {"trainer": 1, "engine": 1, "aligned": 1},
    "mlp_residual": {"trainer": 1, "engine": 1, "aligned": 1},
    "final_norm": {"trainer": 2, "engine": 1, "aligned": 2},
    "logits": {"trainer": 0, "engine": 0, "aligned": 0},
}
"""Number of roundings to the half format for each result, by side. Rope rounds its table, the products and the sum;
attention rounds the probabilities and the result. Head norms (Qwen3) add to those of rope: `Yardstick.roundings`."""

HINTS: dict[str, str] = {
    "embedding": "the embedding: a weight sync that missed it, or resized or padded rows",
    "attention_norm": "RMSNorm: rms_norm_eps, a weight that was not synced, or a norm that adds 1 to its weight",
    "queries": "the query projection: q_proj's weight or bias not synced, or fused rows in a different order",
    "keys": "the key projection: k_proj's weight or bias not synced, or fused rows in a different order",
    "values": "the value projection: v_proj's weight or bias not synced, or fused rows in a different order",
    "rotated_queries": "rope: rope_theta, rope scaling, inv_freq rounded to half, positions, or q_norm",
    "rotated_keys": "rope: rope_theta, rope scaling, inv_freq rounded to half, positions, or k_norm",
    "attention": "attention: its scale, causal mask, sliding window, grouping of heads, or the KV cache",
    "attention_output": "the output projection: o_proj's weight or bias not synced",
    "attention_residual": "the residual sum after attention: a scaled or missing branch",
    "mlp_norm": "RMSNorm: rms_norm_eps, a weight that was not synced, or a norm that adds 1 to its weight",
    "gate_up": "the gate and up projections: weights or biases not synced, or swapped halves",
    "swiglu": "the activation: a function other than SiLU(gate) x up, or swapped halves",
    "down": "the down projection: down_proj's weight or bias not synced",
    "mlp_residual": "the residual sum after the MLP: a scaled or missing branch",
    "final_norm": "RMSNorm: rms_norm_eps, a weight that was not synced, or a norm that adds 1 to its weight",
    "logits": "the LM head: a tied head read from elsewhere, or an untied one that was not synced",
}
"""Likely causes when an operation is the first to differ."""

_LONGEST_SUM: dict[str, str] = {
    **dict.fromkeys(("attention_norm", "queries", "keys", "values", "mlp_norm", "gate_up"), "hidden"),
    **dict.fromkeys(("final_norm", "logits"), "hidden"),
    **dict.fromkeys(("rotated_queries", "rotated_keys", "attention"), "attended"),
    "attention_output": "heads",
    "down": "intermediate",
}
"""Field of `Sizes` that is the length K of an operation's sums; element-wise operations have none."""

_FP32_ROUNDOFF = FORMATS["fp32"].unit_roundoff


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lengths of the sums in one decoder."""

    hidden: int
    """Width of the residual stream."""
    heads: int
    """Width of all query heads together."""
    intermediate: int
    """Width of the MLP."""
    attended: int
    """Length of the longest sequence plus the width of a head: attention sums over both. Also bounds rope's angles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """Bounds on the difference that rounding alone can make between two sides."""

    dtype: DtypeName
    """Format of both sides."""
    sides: tuple[Side, Side]
    """Rounding points of the result and of the reference."""
    sizes: Sizes
    head_norms: bool
    """True if queries and keys are normalised between projection and rope (Qwen3)."""

    def roundings(self, operation: str) -> int:
        """Return the number of roundings on both sides together."""
        count = sum(ROUNDINGS[operation][side] for side in self.sides)
        if self.head_norms and operation.startswith("rotated_"):
            count += sum(ROUNDINGS["attention_norm"][side] for side in self.sides)
        return count

    def bound(self, operation: str) -> float:
        """Return the largest relative error of a row that rounding explains, without underflow."""
        field = _LONGEST_SUM.get(operation)
        longest = getattr(self.sizes, field) if field else 1
        sums = SUM_FACTOR * math.sqrt(longest) * _FP32_ROUNDOFF
        return self.roundings(operation) * FORMATS[self.dtype].unit_roundoff + sums

    def underflow(self, operation: str, width: int) -> float:
        """Return the largest Euclidean norm that rounding among subnormal numbers adds to a row of `width` values."""
        return self.roundings(operation) * FORMATS[self.dtype].min_subnormal / 2 * math.sqrt(width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference between an operation's result and its reference."""

    operation: str
    layer: int | None
    """None outside of layers."""
    local: float | None
    """Relative error of the token whose error is largest relative to its bound; None if a value is not finite."""
    bound: float
    """Largest error of that token that rounding explains."""
    token: int
    """Position of that token, or of the first token with a value that is not finite."""
    rms: float | None
    """Root mean square of the relative error over tokens; None if a value is not finite."""
    identical: bool
    """True if all values are bitwise equal (0 and -0 count as equal)."""
    result_finite: bool
    """True if all values of the result are finite."""
    reference_finite: bool
    """True if all values of the reference are finite."""

    @property
    def exceeds(self) -> bool:
        """True if rounding does not explain the difference: it is above the bound, or a value is not finite."""
        return self.local is None or self.local > self.bound


def compare(
    place: Place, result: Tensor, reference: Tensor, yardstick: Yardstick, *, first_token: int = 0
) -> Difference:
    """Compare one operation's result with its reference, both [T, ...], in float64, row by row.

    Row 0 is the sequence's token `first_token`.

    The row whose error is largest relative to its bound represents the operation: a fault at a single position (a
    cache entry, the edge of a window) is not averaged away, nor hidden by the one token of enormous norm that many
    models have.
    """
    operation, layer = place
    ours, theirs = (x.flatten(1).double() for x in (result, reference))
    finite = (ours.isfinite().all(1), theirs.isfinite().all(1))
    bound = yardstick.bound(operation)
    broken = ~(finite[0] & finite[1])
    if bool(broken.any()):
        local, rms, token = None, None, int(broken.nonzero()[0, 0])
    else:
        # Use at least one subnormal FP32 number: then two rows of zeros are equal, and a row of zeros against any other
        # exceeds its bound.
        norms = torch.linalg.vector_norm(theirs, dim=1).clamp_min(FORMATS["fp32"].min_subnormal)
        errors = torch.linalg.vector_norm(ours - theirs, dim=1) / norms
        bounds = bound + yardstick.underflow(operation, ours.shape[1]) / norms
        token = int((errors / bounds).argmax())
        local, bound, rms = float(errors[token]), float(bounds[token]), float(errors.square().mean().sqrt())
    return Difference(
        operation=operation,
        layer=layer,
        local=local,
        bound=bound,
        token=first_token + token,
        rms=rms,
        identical=bool((ours == theirs).all()),
        result_finite=bool(finite[0].all()),
        reference_finite=bool(finite[1].all()),
    )


def compare_traces(result: Trace, reference: Trace, yardstick: Yardstick) -> list[Difference]:
    """Compare every operation of the reference, in its order.

    An operation that a trace lacks for the first tokens (such as the final norm of a prompt) is compared on the last
    ones.
    """
    tokens = max(rows.shape[0] for rows in reference.values())
    differences = []
    for place, theirs in reference.items():
        count = min(result[place].shape[0], theirs.shape[0])
        ours, first = result[place][-count:], tokens - count
        differences.append(compare(place, ours, theirs[-count:], yardstick, first_token=first))
    return differences


def first_beyond(differences: Iterable[Difference]) -> Difference | None:
    """Return the first operation whose difference is more than rounding, or None."""
    return next((one for one in differences if one.exceeds), None)


def first_unequal(differences: Iterable[Difference]) -> Difference | None:
    """Return the first operation with any difference at all, or None if all are bitwise equal."""
    return next((one for one in differences if not one.identical), None)


def growth(differences: Iterable[Difference]) -> list[float | None]:
    """Return the `rms` difference of the residual stream after each layer, in the order of layers."""
    return [one.rms for one in differences if one.operation == "mlp_residual"]
