"""Facts of the formats, and emulated rounding, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from betterhalf.precision.formats import (
    FORMATS,
    FormatFacts,
    dtype_name,
    narrowest_format,
    round_to_format,
    torch_dtype,
)
from betterhalf.types import DtypeName

NAMES: list[DtypeName] = ["fp16", "bf16", "fp32"]
HALVES: list[DtypeName] = ["fp16", "bf16"]


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Assert that bit patterns are equal, including the sign of zero; any NaN equals any other."""
    assert got.dtype == expected.dtype
    kind = torch.int32 if got.dtype == torch.float32 else torch.int64
    different = (got.view(kind) != expected.view(kind)) & ~(got.isnan() & expected.isnan())
    assert not different.any(), f"{got[different][:5]} instead of {expected[different][:5]}"


def every_finite_half(name: DtypeName) -> Tensor:
    """Return the non-negative finite numbers of a 16-bit format, ascending, in float64."""
    values = torch.arange(2**15, dtype=torch.int16).view(torch_dtype(name)).double()
    return values[values.isfinite()]


@pytest.mark.parametrize("name", NAMES)
def test_facts_equal_those_of_torch(name: DtypeName) -> None:
    facts, info = FORMATS[name], torch.finfo(torch_dtype(name))
    assert (facts.max, facts.eps, facts.min_normal) == (info.max, info.eps, info.tiny)
    assert facts.unit_roundoff == info.eps / 2
    assert 1 + facts.significand_bits - 1 + facts.exponent_bits == info.bits
    assert facts.min_subnormal == torch.tensor(0.0).to(torch_dtype(name)).nextafter(
        torch.tensor(1.0).to(torch_dtype(name))
    )


def test_facts_of_fp16_are_those_of_the_standard() -> None:
    facts = FORMATS["fp16"]
    assert (facts.max, facts.min_normal, facts.min_subnormal) == (65504.0, 6.103515625e-05, 5.960464477539063e-08)
    assert (facts.max_exponent, facts.min_exponent) == (15, -14)


def test_names_and_dtypes_are_inverse() -> None:
    assert [dtype_name(torch_dtype(name)) for name in NAMES] == NAMES


@pytest.mark.parametrize("name", HALVES)
def test_random_fp32_bit_patterns_round_as_torch_casts(name: DtypeName) -> None:
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (400_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    assert_same_bits(round_to_format(x, name), x.to(torch_dtype(name)).float())


@pytest.mark.parametrize("name", HALVES)
def test_every_tie_and_its_fp32_neighbours_round_as_torch_casts(name: DtypeName) -> None:
    grid = every_finite_half(name)
    ties = ((grid[1:] + grid[:-1]) / 2).float()
    near = [ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))]
    x = torch.cat([*near, *(-value for value in near)])
    assert_same_bits(round_to_format(x, name), x.to(torch_dtype(name)).float())


@pytest.mark.parametrize("name", HALVES)
def test_numbers_of_the_format_are_fixed_points(name: DtypeName) -> None:
    grid = every_finite_half(name).float()
    assert_same_bits(round_to_format(grid, name), grid)


def test_fp64_rounds_once_as_numpy_does() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    x = x * 2.0 ** torch.randint(-28, 18, x.shape, generator=generator)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(x.numpy().astype(np.float16).astype(np.float64))
    assert_same_bits(round_to_format(x, "fp16"), expected)


def test_fp64_just_above_a_tie_is_not_rounded_twice() -> None:
    above_tie = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert round_to_format(above_tie, "fp16").item() == 1 + 2.0**-10
    assert above_tie.float().half().item() == 1.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (65519.0, 65504.0),
        (65519.996, 65504.0),
        (65520.0, float("inf")),
        (-65520.0, float("-inf")),
        (1e30, float("inf")),
    ],
)
def test_fp16_overflows_from_65520(value: float, expected: float) -> None:
    assert round_to_format(torch.tensor([value]), "fp16").item() == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.0**-25, 0.0),
        (2.0**-25 * (1 + 2.0**-23), 2.0**-24),
        (1.5 * 2.0**-24, 2.0**-23),
        (2.0**-24, 2.0**-24),
        (1e-8, 0.0),
    ],
)
def test_fp16_underflows_to_zero_at_two_to_minus_25(value: float, expected: float) -> None:
    assert round_to_format(torch.tensor([value]), "fp16").item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_nan_and_signed_zero_stay(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, -(2.0**-30)], dtype=dtype)
    expected = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, -0.0], dtype=dtype)
    assert_same_bits(round_to_format(x, "fp16"), expected)


def test_extreme_doubles_round_to_infinity_and_zero() -> None:
    x = torch.tensor([1e308, 5e-324, -1e-300, -1.7e308], dtype=torch.float64)
    assert round_to_format(x, "fp32").tolist() == [torch.inf, 0.0, 0.0, -torch.inf]


def test_three_significand_bits_leave_four_numbers_in_each_binade() -> None:
    x = torch.linspace(1, 2, 101)[:-1]
    rounded = round_to_format(x, FormatFacts(significand_bits=3, exponent_bits=5))
    assert sorted(set(rounded.tolist())) == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert round_to_format(torch.tensor([1.125, 1.375]), FormatFacts(significand_bits=3, exponent_bits=4)).tolist() == [
        1.0,
        1.5,
    ]


@pytest.mark.parametrize("bits", range(2, 24))
def test_the_error_never_exceeds_the_unit_roundoff(bits: int) -> None:
    facts = FormatFacts(significand_bits=bits, exponent_bits=8)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    error = ((round_to_format(x, facts) - x) / x).abs().max().item()
    assert facts.unit_roundoff / 4 < error <= facts.unit_roundoff


@pytest.mark.parametrize("bits", [(0, 5), (25, 8), (11, 1), (11, 9)])
def test_formats_wider_than_fp32_are_refused(bits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="FP32 does not contain a format"):
        FormatFacts(significand_bits=bits[0], exponent_bits=bits[1])


def test_half_input_is_refused() -> None:
    with pytest.raises(AssertionError, match="FP32 and FP64"):
        round_to_format(torch.ones(2, dtype=torch.float16), "fp16")


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_the_format_of_values_is_recognised_in_tensors_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    values[::7] = 0
    values[3] = float("inf")
    assert narrowest_format(values) == name
    assert narrowest_format(torch.zeros(64, dtype=dtype)) == name  # zeros are representable in every format
