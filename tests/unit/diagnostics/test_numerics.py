"""Magnitudes against values chosen by hand and against torch's own rounding; loss scales against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from betterhalf.diagnostics.numerics import (
    MAX_LOSS_SCALE,
    Magnitudes,
    Spot,
    all_finite,
    headroom_bits,
    magnitudes,
    module_range,
    predicted_loss_scale,
    starting_loss_scale,
    together,
    zeroed_gradients,
)
from betterhalf.precision.formats import FORMATS

FP16 = FORMATS["fp16"]
SPOT = Spot(module="model.layers.0.mlp.down_proj", kind="forward")


def test_values_are_counted_where_fp16_holds_them() -> None:
    subnormal = [2.0**-15, -1.5 * 2.0**-25, 2.0**-24]
    lost = [2.0**-25, -1e-10]
    sizes = magnitudes(torch.tensor([0.0, -0.0, 1.0, -3.0, 2.0**-14, *subnormal, *lost]))
    assert sizes.max_abs == 3.0
    assert sizes.nonzero == 8
    assert sizes.subnormal == (3, 0, 0)
    assert sizes.zeroed == (2, 0, 0)


@pytest.mark.parametrize(("place", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_counts_are_those_of_the_real_rounding(place: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-140, 10, (20000,), generator=generator)
    x = torch.randn(20000, generator=generator).double().mul(2.0 ** exponents.double()).float()
    rounded = x.to(dtype).float()
    facts = list(FORMATS.values())[place]
    sizes = magnitudes(x)
    assert sizes.zeroed[place] == int(((rounded == 0) & (x != 0)).sum()) > 0
    assert sizes.subnormal[place] == int(((x.abs() < facts.min_normal) & (rounded != 0)).sum()) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_infinite(bad: float) -> None:
    assert magnitudes(torch.tensor([1.0, bad])).max_abs == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found_in_every_format(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, dtype=dtype)
    assert all_finite(x) and all_finite(x[:0]) and all_finite(torch.full((3,), 65504.0, dtype=dtype))
    for bad in (math.nan, math.inf, -math.inf):
        x[2, 3] = bad
        assert not all_finite(x) and not all_finite(x.t())


def test_sizes_add_up_to_those_of_the_whole() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e-6
    assert together(magnitudes(x[:300]), magnitudes(x[300:])) == magnitudes(x)


@pytest.mark.parametrize(
    ("largest", "bits"),
    [(65504.0, 0.0), (16376.0, 2.0), (131008.0, -1.0), (0.0, math.inf), (math.inf, -math.inf)],
)
def test_headroom_is_the_bits_left(largest: float, bits: float) -> None:
    assert headroom_bits(largest, FP16) == bits


def test_a_row_has_shares_of_the_non_zero_values() -> None:
    sizes = Magnitudes(max_abs=4.0, nonzero=8, subnormal=(2, 0, 0), zeroed=(1, 0, 0))
    row = module_range(SPOT, sizes, "fp16", finite=True)
    assert (row.subnormal_fraction, row.zero_fraction) == (0.25, 0.125)
    assert row.to_json() == {
        "module": "model.layers.0.mlp.down_proj",
        "kind": "forward",
        "max_abs": 4.0,
        "headroom_bits": math.log2(65504 / 4),
        "subnormal_fraction": 0.25,
        "zero_fraction": 0.125,
        "finite": True,
    }


def test_an_island_is_measured_by_the_format_that_holds_it() -> None:
    sizes = magnitudes(torch.tensor([1e6, 1e-9]))
    assert module_range(SPOT, sizes, "fp16", finite=True).headroom_bits < 0
    assert module_range(SPOT, sizes, "fp32", finite=True).headroom_bits > 100
    assert module_range(SPOT, sizes, "fp32", finite=True).zero_fraction == 0.0


def test_all_zeros_have_no_shares_and_infinite_headroom() -> None:
    row = module_range(SPOT, magnitudes(torch.zeros(3)), "fp16", finite=True)
    assert (row.subnormal_fraction, row.zero_fraction, row.headroom_bits) == (0.0, 0.0, math.inf)


@pytest.mark.parametrize("largest", [1e-4, 0.7, 1.0, 3.14, 65504.0, 65505.0, 1e6])
def test_the_predicted_scale_is_the_largest_power_of_two_that_fits(largest: float) -> None:
    scale = predicted_loss_scale(largest, FP16)
    assert math.log2(scale).is_integer()
    assert scale * largest <= FP16.max < 2 * scale * largest


def test_predicted_scales_are_bounded() -> None:
    assert predicted_loss_scale(0.0, FP16) == MAX_LOSS_SCALE
    assert predicted_loss_scale(1e-30, FP16) == MAX_LOSS_SCALE
    assert predicted_loss_scale(math.inf, FP16) == 0.0


@pytest.mark.parametrize(("safe", "start"), [(2.0**20, 2.0**18), (2.0, 1.0), (0.25, 1.0), (None, 1.0)])
def test_training_starts_two_bits_below_the_largest_safe_scale(safe: float | None, start: float) -> None:
    assert starting_loss_scale(safe) == start


def test_zeroed_gradients_are_those_that_fp32_has() -> None:
    nonzero = {"a": torch.tensor([True, True, False, True]), "b": torch.tensor([True, False])}
    gradients = {"a": torch.tensor([1.0, 0.0, 0.0, 0.0]), "b": torch.tensor([2.0, 0.0])}
    zeroed = zeroed_gradients(nonzero, gradients.items())
    assert zeroed.fraction == 0.5
    assert zeroed.worst == ("a",)


def test_without_gradients_nothing_is_zeroed() -> None:
    zeroed = zeroed_gradients({"a": torch.tensor([False])}, [("a", torch.tensor([0.0]))])
    assert (zeroed.fraction, zeroed.worst) == (0.0, ())


def test_a_spot_reads_as_words() -> None:
    assert str(SPOT) == "the output of model.layers.0.mlp.down_proj"
    assert str(Spot(module="lm_head", kind="gradient")) == "the weight gradient of lm_head"
