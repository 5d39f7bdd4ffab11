"""Axes: bounds, ticks, labels, and the pixel of a value."""

from __future__ import annotations

import math

import pytest

from betterhalf.report.axis import Axis, Scale, fit, nice_step, step_ticks, steps_axis


def fitted(values: list[float], scale: Scale, include: tuple[float, ...] = ()) -> Axis:
    axis = fit(values, scale=scale, start=200.0, end=0.0, include=include)
    assert axis is not None
    return axis


def test_a_linear_axis_has_round_bounds_and_ticks() -> None:
    axis = fitted([0.61, 0.93], "linear", include=(0.0, 1.0))
    assert (axis.low, axis.high) == (0.0, 1.0)
    assert [axis.label(tick) for tick in axis.ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert axis.pixel(0.25) == pytest.approx(150.0)


def test_a_decimal_log_axis_places_decades_evenly() -> None:
    axis = fitted([1e-8, 1e-4], "log10")
    assert (axis.low, axis.high) == pytest.approx((1e-8, 1e-4))
    assert axis.pixel(1e-6) == pytest.approx(100.0)
    assert axis.pixel(1e-7) == pytest.approx(150.0)
    assert [axis.label(t) for t in axis.ticks()] == [
        "10\u207b\u2078",
        "10\u207b\u2077",
        "10\u207b\u2076",
        "10\u207b\u2075",
        "10\u207b\u2074",
    ]


def test_a_narrow_log_axis_has_ticks_between_decades() -> None:
    axis = fitted([0.23, 1.7], "log10")
    assert axis.ticks() == pytest.approx([0.2, 0.5, 1.0, 2.0])
    assert [axis.label(t) for t in axis.ticks()] == ["0.2", "0.5", "1", "2"]
    assert axis.label(2e-5) == "2\u00b710\u207b\u2075"


def test_a_constant_loss_scale_lies_in_the_middle_of_its_axis() -> None:
    axis = fitted([65536.0, 65536.0], "log2")
    assert axis.pixel(65536.0) == pytest.approx(100.0)
    assert axis.label(65536.0) == "2\u00b9\u2076"


def test_wide_power_axes_thin_their_ticks() -> None:
    axis = fitted([1.0, 65536.0], "log2")
    assert axis.ticks() == [2.0**p for p in (0, 4, 8, 12, 16)]
    assert len(fitted([1e-30, 1.0], "log10").ticks()) <= 7


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_constant_is_drawn_inside_a_linear_axis(value: float) -> None:
    axis = fitted([value], "linear")
    assert axis.low < value < axis.high


def test_what_cannot_be_drawn_does_not_count() -> None:
    assert fit([math.nan, math.inf], scale="linear", start=0, end=1) is None
    assert fit([0.0, -1.0, math.nan], scale="log10", start=0, end=1) is None
    assert fitted([0.0, 1e-3, 1e-1], "log10").low == pytest.approx(1e-3)


def test_values_beyond_the_axis_land_on_its_edge() -> None:
    axis = Axis(scale="log10", low=1e-6, high=1e-2, start=200.0, end=0.0)
    assert axis.pixel(0.0) == 200.0
    assert axis.pixel(1.0) == 0.0


def test_tiny_and_large_linear_ticks_stay_readable() -> None:
    tiny = fitted([-4e-6, 4e-6], "linear")
    assert tiny.label(2e-6) == "2\u00b710\u207b\u2076"
    assert tiny.label(0.0) == "0"
    assert fitted([0.0, 40000.0], "linear").label(20000.0) == "20,000"


def test_step_ticks_start_at_the_first_step_and_are_round() -> None:
    assert step_ticks(steps_axis(range(1, 66), start=0, end=1)) == [1, 20, 40, 60]
    assert step_ticks(steps_axis(range(1, 6), start=0, end=1)) == [1, 2, 3, 4, 5]
    assert step_ticks(steps_axis([7], start=0, end=1)) == [7]


@pytest.mark.parametrize(("rough", "nice"), [(0.8, 1.0), (1.0, 1.0), (1.1, 2.0), (2.5, 5.0), (6.0, 10.0), (0.03, 0.05)])
def test_nice_steps_are_1_2_5(rough: float, nice: float) -> None:
    assert nice_step(rough) == pytest.approx(nice)
