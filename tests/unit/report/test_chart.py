"""Figures as specifications: valid Vega-Lite, the right tables, and text that tries to break out."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import altair as alt
import pytest

from betterhalf.report.chart import Chart, Mark, Series, draw
from betterhalf.report.drawing import Drawing, drawings_of, theme


def line(values: list[float], style: int = 0, tag: str = "fp16", marks: tuple[Mark, ...] = ()) -> Series:
    return Series(tag=tag, name=tag, style=style, points=list(enumerate(values, 1)), marks=marks)


def drawn(*lines: Series, **choices: Any) -> Drawing:
    image = draw(Chart(**({"key": "k", "title": "T", "include": (0.0, 1.0)} | choices), series=lines))
    assert image is not None
    return image


def plotted(*series: Series, **choices: Any) -> Drawing:
    image = draw(Chart(**({"key": "p", "title": "T", "across": "x"} | choices), series=series))
    assert image is not None
    return image


def series(points: list[tuple[float, float]], style: int = 0, **choices: Any) -> Series:
    return Series(**({"name": "fp16", "style": style, "points": points, "joined": False} | choices))


EVENTS = (Mark(step=2, value=0.5, text="skipped"), Mark(step=3, text="stopped", flag=True))
DRAWINGS = {
    "chart": lambda: drawn(line([0.1, 0.9, 0.4], marks=EVENTS), band=(0.0, 0.5), rules=((0.3, "watchdog"),)),
    "smooth": lambda: drawn(line([0.1, 0.9] * 20), line([0.5] * 40, 1), smooth=True, wide=True),
    "log": lambda: drawn(line([1e-8, 1e-4]), scale="log10", include=(), band=(None, 1e-3)),
    "powers": lambda: drawn(line([65536.0] * 3), scale="log2", include=()),
    "cloud": lambda: plotted(
        series([(1.0, 1.0), (3.0, 2.0)], fit=(0.5, 0.5)), wedge=(-0.2, 0.2), across='it\'s a "name"'
    ),
    "joined": lambda: plotted(
        series([(0.0, 1.0)], joined=True), rules=((1.0, "x"),), across_ticks=((0.0, "a"),), guide=((0, 0), (1, 1))
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_specifications_follow_the_schema(name: str) -> None:
    text = json.dumps({**DRAWINGS[name]().spec, "config": theme()})
    alt.LayerChart.from_dict(json.loads(re.sub(r"var\(--\w+\)", "#000000", text)))


@pytest.mark.parametrize("name", DRAWINGS)
def test_figures_are_drawn_with_a_shape_for_each_layer(name: str) -> None:
    svg = DRAWINGS[name]().svg()
    assert svg.startswith("<svg")
    assert "NaN" not in svg and "Infinity" not in svg


def test_values_are_columns_and_nan_breaks_the_line() -> None:
    values = drawn(line([0.1, math.nan, 0.3])).tables["values"]
    assert values == [{"a": 0, "k": 0, "x": [1, 2, 3], "y": [0.1, None, 0.3]}]


def test_a_lone_point_gets_a_marker() -> None:
    (markers,) = drawn(line([0.1, 0.2, math.nan, 0.3, math.nan, 0.4, 0.5])).tables["markers"]
    assert 4 in markers["x"]


def test_each_point_of_a_short_line_has_a_marker() -> None:
    (markers,) = drawn(line([0.5] * 40)).tables["markers"]
    assert markers["x"] == list(range(1, 41))
    (markers,) = drawn(line([0.5] * 41)).tables["markers"]
    assert 1 < len(markers["x"]) < 8
    (markers,) = drawn(line([0.5] * 30), smooth=True).tables["markers"]
    assert 1 < len(markers["x"]) < 8


def test_zero_has_no_place_on_a_log_axis() -> None:
    (values,) = drawn(line([1e-6, 0.0, 1e-4]), scale="log10", include=()).tables["values"]
    assert values["y"] == [1e-6, None, 1e-4]


def test_nothing_to_draw_is_none() -> None:
    for lines in ((line([math.nan, math.nan]),), (line([]),), ()):
        assert draw(Chart(key="k", title="T", include=(0.0,), series=lines)) is None
    assert draw(Chart(key="k", title="T", series=(series([(1.0, 0.0)]),), across="x", scale="log10")) is None
    assert draw(Chart(key="k", title="T", series=(), across="x")) is None


def test_an_axis_of_zeros_reaches_the_healthy_bound_and_nothing_below_zero() -> None:
    image = drawn(line([0.0] * 5), include=(0.0,), band=(None, 1e-4))
    assert {"name": "shown", "value": (0.0, 1e-4)} in image.spec["params"]


def test_the_band_covers_exactly_its_share_of_the_axis() -> None:
    svg = drawn(line([1e-4, 1e-2]), scale="log10", include=(), band=(None, 1e-3)).svg()
    (y, height) = re.findall(r'd="M0,([\d.]+)h420v([\d.]+)h-420Z" fill="#1a7f37"', svg)[0]
    assert float(y) == pytest.approx(100, abs=0.5)
    assert float(y) + float(height) == pytest.approx(200)
    assert "healthy: at most 0.001" in svg


def test_labels_at_the_ends_of_lines_are_apart() -> None:
    ends = drawn(line([0.5] * 3, 0, "fp16"), line([0.5] * 3, 1, "bf16")).tables["ends"]
    assert {end["text"] for end in ends} == {"fp16", "bf16"}
    assert abs(ends[0]["y"][0] - ends[1]["y"][0]) == pytest.approx(14 / 200, abs=1e-4)


def test_labels_of_lines_that_end_far_apart_do_not_push_each_other() -> None:
    ends = drawn(line([0.5] * 40, 0, "long"), line([0.5] * 3, 1, "short")).tables["ends"]
    assert ends[0]["y"] == ends[1]["y"]


def test_short_runs_are_not_smoothed() -> None:
    assert drawn(line([0.1, 0.9] * 5), smooth=True).tables["means"] == []
    assert drawn(line([0.1, 0.9] * 20), smooth=True).tables["means"]


def test_the_figure_is_named_and_described_for_screen_readers() -> None:
    image = drawn(line([0.25, 0.75]))
    assert image.description == "fp16: 2 steps, first 0.25, last 0.75, lowest 0.25, highest 0.75."
    assert 'role="img" aria-labelledby="k-t k-d"' in image.html()


def test_the_legend_of_a_file_lists_a_cloud_with_its_line_once() -> None:
    parts = [series([(0.0, 1.0), (2.0, 3.0)], 1), series([(0.0, 1.0), (2.0, 2.0)], 1, joined=True)]
    svg = plotted(*parts, series([(0.0, 4.0)], 2, joined=True)).svg()
    assert svg.count(">fp16</text>") == 2


def test_hostile_names_stay_text() -> None:
    evil = '</script><script>alert("1")</script>'
    image = drawn(line([0.1, 0.2], tag=evil, marks=(Mark(step=1, value=0.1, text=evil),)), title=evil)
    page = image.html()
    assert page.count("<script") == page.count("</script") == 1
    (again,) = drawings_of(page)
    assert (again.title, again.tables["events"][0]["text"]) == (evil, evil)


def test_a_fit_runs_from_the_first_to_the_last_x_or_from_the_origin() -> None:
    (fit,) = plotted(series([(10.0, 1.0), (30.0, 3.0)], fit=(0.1, 0.0))).tables["fits"]
    assert (fit["x"], fit["y"]) == ([10, 30], [1, 3])
    (fit,) = plotted(series([(20.0, 1.0), (20.0, 3.0)], fit=(0.1, 0.0))).tables["fits"]
    assert (fit["x"], fit["y"]) == ([0, 20], [0, 2])


def test_what_has_no_place_is_left_out() -> None:
    points = [(1.0, 1e-6), (2.0, 0.0), (math.nan, 1e-5), (3.0, 1e-4)]
    (joined,) = plotted(series(points, joined=True), scale="log10").tables["values"]
    assert (joined["x"], joined["y"]) == ([1, 2, 3], [1e-6, None, 1e-4])
    (cloud,) = plotted(series(points), scale="log10").tables["clouds"]
    assert cloud["x"] == [1, 3]
