"""Numbers behind the figures: extremes that thinning keeps, averages, fits, ranges of axes, labels moved apart."""

from __future__ import annotations

import math

import pytest

from betterhalf.report.numbers import (
    extent,
    least_squares,
    points_of_line,
    share,
    smoothed,
    smoothing_window,
    spread,
    superscript,
    thin,
    value_at,
)


def test_thinning_keeps_every_extreme() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    points[5003] = (5003.0, 99.0)
    points[777] = (777.0, -99.0)
    kept = thin(points, 400)
    assert len(kept) <= 400
    assert (5003.0, 99.0) in kept
    assert (777.0, -99.0) in kept
    assert kept == sorted(kept)


def test_thinning_keeps_a_gap() -> None:
    kept = thin([(float(x), math.nan if 400 <= x < 600 else 1.0 + x) for x in range(1000)], 100)
    assert any(math.isnan(y) for _, y in kept)
    assert min(y for _, y in kept if y == y) == 1.0


def test_the_points_of_a_figure_are_bounded() -> None:
    assert [points_of_line(lines) for lines in (1, 4, 100)] == [1000, 500, 200]


def test_the_moving_average_is_centred_and_shortened_at_the_ends() -> None:
    assert smoothed([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert smoothed([1.0, math.nan, 3.0], 3)[::2] == [1.0, 3.0]
    assert math.isnan(smoothed([1.0, math.nan, 3.0], 3)[1])


def test_smoothing_is_geometric_on_a_log_axis() -> None:
    values = [1e-8] * 20
    values[10] = 1e-5
    # Three steps: two of 1e-8 and one of 1e-5 multiply to 1e-21.
    assert smoothing_window(20) == 3
    assert smoothed(values, 3, "log10")[10] == pytest.approx(1e-7)
    assert math.isnan(smoothed([1e-8, 0.0, 1e-8], 3, "log10")[1])


def test_the_range_of_an_axis_holds_values_and_what_it_must_reach() -> None:
    assert extent([0.2, math.nan, 0.6], "linear", (0.0, 1.0)) == (0.0, 1.0)
    assert extent([1e-6, 0.0, 1e-4], "log10") == (1e-6, 1e-4)
    assert extent([math.nan, 0.0], "log10") is None
    assert extent([], "linear") is None


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [(0.0, (1e-4,), (0.0, 1e-4)), (0.0, (), (0.0, 1.0)), (5.0, (), (4.5, 5.5)), (-5.0, (), (-5.5, -4.5))],
)
def test_equal_values_get_a_range_that_means_something(
    value: float, bounds: tuple[float, ...], expected: tuple[float, float]
) -> None:
    assert extent([value] * 3, "linear", (value,), bounds) == pytest.approx(expected)


def test_equal_values_on_a_log_axis_are_in_its_middle() -> None:
    assert extent([65536.0, 65536.0], "log2") == (32768.0, 131072.0)


def test_least_squares_by_hand() -> None:
    # Means 2 and 3; sum of products 4, of squares 2.
    assert least_squares([(1.0, 1.0), (2.0, 3.0), (3.0, 5.0)]) == pytest.approx((2.0, -1.0))
    assert least_squares([(4.0, 1.0), (4.0, 3.0)]) == (0.5, 0.0)
    assert math.isnan(least_squares([])[0])
    assert math.isnan(least_squares([(0.0, 1.0)])[0])


def test_spread_keeps_order_gap_and_bounds() -> None:
    assert spread([50.0, 50.0, 90.0], 14, 100) == [50.0, 64.0, 90.0]
    assert spread([99.0, 100.0], 14, 100) == [86.0, 100.0]
    assert spread([90.0, 50.0], 14, 100) == [90.0, 50.0]
    assert spread([], 14, 100) == []


def test_places_are_shares_of_the_axis() -> None:
    assert share("log10", 1e-6, (1e-8, 1e-4)) == pytest.approx(0.5)
    assert value_at("log10", 0.5, (1e-8, 1e-4)) == pytest.approx(1e-6)
    assert share("linear", 3.0, (0.0, 4.0)) == 0.75


def test_exponents_are_raised() -> None:
    assert superscript(-18) == "\u207b\u00b9\u2078"
