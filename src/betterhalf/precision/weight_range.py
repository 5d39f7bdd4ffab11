"""Refusal of weights that are too large for a format that they are rounded to."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from betterhalf.config.schema import PrecisionRoles
from betterhalf.errors import InputError
from betterhalf.precision.formats import FORMATS


@torch.no_grad()
def require_weights_fit(weights: Iterable[tuple[str, Tensor]], roles: PrecisionRoles) -> None:
    """Refuse finite weights above the largest finite number of the compute, wire or rollout format.

    Formats with the exponent range of FP32 take all weights.

    Args:
        weights: (name, FP32 values) of the model.
        roles: formats of the run. FP32 islands do not help: their weights are rounded, too.

    Raises:
        InputError: the message names the parameter, its largest value and the format.
    """
    used = (roles.compute_dtype, roles.wire_dtype, roles.rollout_dtype)
    narrowest = min(used, key=lambda name: FORMATS[name].max)
    largest = FORMATS[narrowest].max
    if FORMATS[narrowest].max_exponent == FORMATS["fp32"].max_exponent:
        return
    for name, weight in weights:
        low, high = (float(value) for value in weight.aminmax())
        if largest < max(-low, high) < math.inf:  # what is not finite in the files is reported by the engine
            value = low if -low > high else high
            raise InputError(
                f"the model's weight {name} holds {value:.6g}, which does not fit into {narrowest} (at most "
                f"{largest:g}); set precision=bf16 or precision=fp32"
            )
