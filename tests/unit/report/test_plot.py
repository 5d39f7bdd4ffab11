"""Plots: points, lines and wedges are drawn at the right pixels, and values that cannot be drawn are left out."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from betterhalf.report.canvas import BOTTOM, LEFT, RIGHT, TOP
from betterhalf.report.plot import Plot, Series, draw_plot, least_squares


def series(points: list[tuple[float, float]], **choices: object) -> Series:
    return Series(name="fp16", style=0, points=points, **choices)  # type: ignore[arg-type]


def drawn(*of: Series, **choices: object) -> ElementTree.Element:
    image = draw_plot(Plot(key="k", title="T", series=of, across_name="x", **choices))  # type: ignore[arg-type]
    assert image is not None
    return ElementTree.fromstring(image)


def path(root: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    (d,) = [element.get("d", "") for element in root.iter("path") if (element.get("class") or "").startswith(kind)]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)]


def test_points_of_a_cloud_land_where_the_axes_say() -> None:
    root = drawn(series([(0.0, 0.0), (1.0, 1.0), (0.5, 0.25)]), across_range=(0.0, 1.0), include=(0.0, 1.0))
    height = BOTTOM - TOP
    assert path(root, "cloud") == [(LEFT, BOTTOM), (RIGHT, TOP), ((LEFT + RIGHT) / 2, BOTTOM - height / 4)]


def test_the_fit_runs_from_the_first_to_the_last_length() -> None:
    cloud = series([(10.0, 1.0), (30.0, 3.0)], fit=(0.1, 0.0))
    assert path(drawn(cloud, across_range=(0.0, 40.0), include=(0.0, 4.0)), "line") == [
        (LEFT + (RIGHT - LEFT) / 4, BOTTOM - (BOTTOM - TOP) / 4),
        (LEFT + 3 * (RIGHT - LEFT) / 4, BOTTOM - 3 * (BOTTOM - TOP) / 4),
    ]


def test_the_fit_of_equal_lengths_starts_at_the_origin() -> None:
    cloud = series([(20.0, 1.0), (20.0, 3.0)], fit=(0.1, 0.0))
    line = path(drawn(cloud, across_include=(0.0,), include=(0.0, 4.0)), "line")
    assert line[0] == (LEFT, BOTTOM)
    assert line[1][1] == pytest.approx((BOTTOM + TOP) / 2)


def test_the_wedge_is_bounded_by_its_slopes() -> None:
    root = drawn(series([(0.0, -1.0), (100.0, 1.0)]), wedge=(-0.005, 0.005), across_range=(0.0, 100.0))
    (wedge,) = [element for element in root.iter("polygon") if element.get("class") == "band"]
    corners = [tuple(map(float, pair.split(","))) for pair in wedge.get("points", "").split()]
    middle, quarter = (TOP + BOTTOM) / 2, (BOTTOM - TOP) / 4
    assert corners[0] == (LEFT, middle)
    assert [corner[1] for corner in corners if corner[0] == RIGHT] == [middle - quarter, middle + quarter]


def test_what_has_no_place_is_left_out() -> None:
    root = drawn(series([(1.0, 1e-6), (2.0, 0.0), (math.nan, 1e-5), (3.0, 1e-4)], joined=True), scale="log10")
    assert len(path(root, "line")) == 2


def test_nothing_to_draw_is_none() -> None:
    assert draw_plot(Plot(key="k", title="T", series=(series([(1.0, 0.0)]),), across_name="x", scale="log10")) is None
    assert draw_plot(Plot(key="k", title="T", series=(), across_name="x")) is None


def test_labels_that_would_touch_lose_their_text() -> None:
    ticks = tuple((float(x), f"{x}") for x in range(0, 101, 5))
    root = drawn(series([(0.0, 0.0), (100.0, 1.0)]), across_range=(0.0, 100.0), across_ticks=ticks)
    texts = [element for element in root.iter("text") if element.get("text-anchor") == "middle" and element.text]
    places = [float(element.get("x", "")) for element in texts]
    assert all(b - a >= 34 for a, b in itertools.pairwise(places))
    assert len(places) == 7


def test_a_named_rule_stands_at_its_value() -> None:
    root = drawn(series([(0.0, 0.0), (1.0, 4.0)]), rules=((2.0, "watch"), (99.0, "never")))
    (rule,) = [element for element in root.iter("line") if element.get("class") == "rule"]
    assert float(rule.get("y1", "")) == pytest.approx((TOP + BOTTOM) / 2)
    assert "watch" in "".join(root.itertext())
    assert "never" not in "".join(root.itertext())


def test_least_squares_by_hand() -> None:
    # Means 2 and 3; sum of products 4, of squares 2.
    assert least_squares([(1.0, 1.0), (2.0, 3.0), (3.0, 5.0)]) == pytest.approx((2.0, -1.0))
    assert least_squares([(4.0, 1.0), (4.0, 3.0)]) == (0.5, 0.0)
    assert math.isnan(least_squares([])[0])
    assert math.isnan(least_squares([(0.0, 1.0)])[0])
