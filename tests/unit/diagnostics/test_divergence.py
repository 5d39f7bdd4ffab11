"""Faults distinguished from rounding: bounds computed by hand, and results on either side of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from betterhalf.diagnostics.divergence import (
    HINTS,
    ROUNDINGS,
    Place,
    Side,
    Sizes,
    Yardstick,
    compare,
    compare_traces,
    first_beyond,
    first_unequal,
    growth,
)
from betterhalf.precision.formats import round_to_format
from betterhalf.rollout.native.decoder import OPERATIONS
from betterhalf.types import DtypeName

SIZES = Sizes(hidden=64, heads=64, intermediate=256, attended=100)


def yardstick(dtype: DtypeName, sides: tuple[Side, Side] = ("engine", "trainer"), *, norms: bool = False) -> Yardstick:
    return Yardstick(dtype=dtype, sides=sides, sizes=SIZES, head_norms=norms)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_operation_of_the_decoder_has_roundings_and_a_hint() -> None:
    assert tuple(ROUNDINGS) == (*OPERATIONS, "logits")
    assert HINTS.keys() == ROUNDINGS.keys()


def test_bounds_by_hand() -> None:
    # Engine: one rounding of SiLU(gate) x up; trainer: SiLU, and the product. Element-wise: K = 1.
    assert yardstick("fp16").bound("swiglu") == 3 * 2**-11 + 64 * 2**-24
    # One rounding on each side of a sum over 256.
    assert yardstick("bf16").bound("down") == 2 * 2**-8 + 64 * 16 * 2**-24
    assert yardstick("fp32").bound("embedding") == 64 * 2**-24


def test_head_norms_count_with_rope() -> None:
    # Rope: 3 on the trainer's side, 1 on the engine's; a norm before it: 2 and 1.
    assert yardstick("fp16").roundings("rotated_keys") == 4
    assert yardstick("fp16", norms=True).roundings("rotated_keys") == 7
    assert yardstick("fp16", norms=True).roundings("keys") == 2


@pytest.mark.parametrize("operation", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("mode", ["engine", "aligned"])
def test_a_fault_of_one_per_cent_exceeds_every_bound(operation: str, dtype: DtypeName, mode: Side) -> None:
    wide = Sizes(hidden=8192, heads=8192, intermediate=49152, attended=16384)
    stick = Yardstick(dtype=dtype, sides=(mode, "trainer"), sizes=wide, head_norms=True)
    assert stick.bound(operation) < 0.01


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_one_rounding_against_two_is_rounding_and_a_scaled_result_is_not(dtype: DtypeName) -> None:
    exact, weight = rows(50, 64), rows(64, seed=1)
    once = round_to_format(exact * weight, dtype)
    twice = round_to_format(round_to_format(exact, dtype) * weight, dtype)
    assert not compare(("attention_norm", 0), once, twice, yardstick(dtype)).exceeds
    assert compare(("attention_norm", 0), once * 1.02, twice, yardstick(dtype)).exceeds


def test_relative_error_by_hand_and_the_worst_token_decides() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0], [6000.0, 8000.0]])
    result = torch.tensor([[3.0, 4.5], [0.0, 2.0], [6000.0, 8000.0]])
    found = compare(("down", 2), result, reference, yardstick("fp16"), first_token=10)
    assert (found.operation, found.layer, found.token) == ("down", 2, 10)
    assert found.local == pytest.approx(0.1)
    assert found.rms == pytest.approx(0.1 / math.sqrt(3))
    assert found.exceeds and not found.identical


def test_a_token_of_enormous_norm_hides_nothing() -> None:
    reference = rows(20, 8)
    reference[0] *= 1e5
    result = reference.clone()
    result[13] *= 1.01
    found = compare(("values", 0), result, reference, yardstick("fp16"))
    assert found.exceeds and found.token == 13
    assert found.local == pytest.approx(0.01)


def test_rounding_among_subnormal_numbers_is_rounding() -> None:
    exact = rows(5, 32) * 1e-6
    reference, result = exact.clone(), round_to_format(exact, "fp16")
    assert float((result - reference).norm() / reference.norm()) > yardstick("fp16").bound("down")
    assert not compare(("down", 0), result, reference, yardstick("fp16")).exceeds
    assert compare(("down", 0), result * 1.2, reference, yardstick("fp16")).exceeds


def test_zeros_equal_zeros_and_nothing_else() -> None:
    zeros = torch.zeros(3, 4)
    equal = compare(("swiglu", 0), zeros, -zeros, yardstick("fp32"))
    assert equal.identical and equal.local == 0 and not equal.exceeds
    assert compare(("swiglu", 0), torch.full((3, 4), 1e-3), zeros, yardstick("fp32")).exceeds


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_a_fault_of_the_side_that_holds_it(value: float) -> None:
    reference = rows(6, 4)
    result = reference.clone()
    result[4, 1] = value
    found = compare(("down", 1), result, reference, yardstick("fp16"))
    assert found.exceeds and found.local is None and found.rms is None and found.token == 4
    assert (found.result_finite, found.reference_finite) == (False, True)
    both = compare(("down", 1), result, result, yardstick("fp16"))
    assert both.exceeds and (both.result_finite, both.reference_finite) == (False, False)


def test_firsts_follow_the_order_of_the_reference() -> None:
    exact = rows(10, 8)
    reference: dict[Place, Tensor] = {
        ("keys", 0): exact,
        ("values", 0): exact,
        ("mlp_residual", 0): exact,
        ("mlp_residual", 1): exact,
    }
    nudged = exact * (1 + 2**-12)
    result: dict[Place, Tensor] = {
        ("mlp_residual", 1): exact * 1.5,
        ("mlp_residual", 0): exact * 1.25,
        ("values", 0): nudged,
        ("keys", 0): exact,
    }
    found = compare_traces(result, reference, yardstick("fp16"))
    unequal, beyond = first_unequal(found), first_beyond(found)
    assert unequal is not None and (unequal.operation, unequal.layer) == ("values", 0)
    assert beyond is not None and (beyond.operation, beyond.layer) == ("mlp_residual", 0)
    assert growth(found) == pytest.approx([0.25, 0.5])
    same = compare_traces(reference, reference, yardstick("fp16"))
    assert first_unequal(same) is None and first_beyond(same) is None


def test_a_trace_without_the_first_tokens_is_compared_on_the_last() -> None:
    whole = {("values", 0): rows(10, 8), ("final_norm", None): rows(10, 8)}
    decoded = {("values", 0): whole["values", 0], ("final_norm", None): whole["final_norm", None][6:].clone()}
    assert first_unequal(compare_traces(decoded, whole, yardstick("fp32"))) is None
    decoded["final_norm", None][1] *= 2
    found = first_beyond(compare_traces(decoded, whole, yardstick("fp32")))
    assert found is not None and found.token == 7
    short = {("values", 0): whole["values", 0], ("final_norm", None): whole["final_norm", None][6:]}
    both_short = first_beyond(compare_traces(decoded, short, yardstick("fp32")))
    assert both_short is not None and both_short.token == 7
