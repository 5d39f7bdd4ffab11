"""Charts: the numbers in the SVG, gaps, bands, marks, labels, and text that tries to break out."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from betterhalf.report.canvas import BOTTOM, LEFT, RIGHT, TOP, spread, thin
from betterhalf.report.chart import Chart, Line, Mark, draw, moving_average, smoothed, smoothing_window


def line(values: list[float], style: int = 0, tag: str = "fp16", marks: tuple[Mark, ...] = ()) -> Line:
    steps = range(1, len(values) + 1)
    return Line(tag=tag, name=tag, style=style, steps=steps, values=values, marks=marks)


def chart(*lines: Line, **choices: object) -> Chart:
    defaults: dict[str, object] = {"key": "k", "title": "T", "scale": "linear", "include": (0.0, 1.0)}
    return Chart(lines=lines, **(defaults | choices))  # type: ignore[arg-type]


def drawn(*lines: Line, **choices: object) -> ElementTree.Element:
    image = draw(chart(*lines, **choices))
    assert image is not None
    return ElementTree.fromstring(image)


def paths(root: ElementTree.Element, kind: str) -> list[list[tuple[float, float]]]:
    found = [element.get("d", "") for element in root.iter("path") if element.get("class") == kind]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)] for d in found]


def test_points_land_where_the_axes_say() -> None:
    (points,) = paths(drawn(line([0.0, 0.25, 1.0])), "line")
    height = BOTTOM - TOP
    assert points == [(LEFT, BOTTOM), ((LEFT + RIGHT) / 2, BOTTOM - height / 4), (RIGHT, TOP)]


def test_points_on_a_log_axis_land_where_the_logarithm_says() -> None:
    (points,) = paths(drawn(line([1e-8, 1e-6, 1e-4]), scale="log10", include=()), "line")
    assert [y for _, y in points] == pytest.approx([BOTTOM, (BOTTOM + TOP) / 2, TOP])


def test_nan_breaks_the_line_and_a_lone_point_gets_a_marker() -> None:
    root = drawn(line([0.1, 0.2, math.nan, 0.3, math.nan, 0.4, 0.5]))
    assert [len(points) for points in paths(root, "line")] == [2, 1, 2]
    lone_x = LEFT + (RIGHT - LEFT) * 3 / 6
    assert any(float(c.get("cx", "0")) == pytest.approx(lone_x, abs=0.05) for c in root.iter("circle"))


def test_zero_has_no_place_on_a_log_axis() -> None:
    root = drawn(line([1e-6, 0.0, 1e-4]), scale="log10", include=())
    assert [len(points) for points in paths(root, "line")] == [1, 1]


def test_nothing_to_draw_is_none() -> None:
    assert draw(chart(line([math.nan, math.nan]))) is None
    assert draw(chart(line([]))) is None
    assert draw(chart()) is None


def test_the_band_covers_exactly_its_share_of_the_axis() -> None:
    root = drawn(line([1e-4, 1e-2]), scale="log10", include=(), band=(None, 1e-3))
    (band,) = [element for element in root.iter("rect") if element.get("class") == "band"]
    middle = (TOP + BOTTOM) / 2
    assert float(band.get("y", "")) == pytest.approx(middle)
    assert float(band.get("y", "")) + float(band.get("height", "")) == pytest.approx(BOTTOM)
    edges = [element.get("y1") for element in root.iter("line") if element.get("class") == "edge"]
    assert edges == [f"{middle:.1f}"]
    assert "healthy: at most 0.001" in "".join(root.itertext())


def test_a_band_wider_than_the_data_fills_the_plot_without_an_edge() -> None:
    root = drawn(line([1e-8, 1e-6]), scale="log10", include=(), band=(None, 1e-3))
    (band,) = [element for element in root.iter("rect") if element.get("class") == "band"]
    assert float(band.get("height", "")) == pytest.approx(BOTTOM - TOP)
    assert not [element for element in root.iter("line") if element.get("class") == "edge"]


def test_a_mark_is_a_cross_at_its_place_with_its_text() -> None:
    root = drawn(
        line([65536.0, 32768.0], marks=(Mark(step=2, value=32768.0, text="skipped"),)), scale="log2", include=()
    )
    (mark,) = [group for group in root.iter("g") if group.get("class") == "mark"]
    assert mark.findtext("title") == "skipped"
    (path,) = mark.iter("path")
    (end,) = [points[-1] for points in paths(root, "line")]
    assert path.get("d", "").startswith(f"M{end[0] - 4:.1f} {end[1] - 4:.1f}")


def test_series_differ_by_class_marker_and_end_label() -> None:
    root = drawn(line([0.5] * 3, 0, "fp16"), line([0.5] * 3, 1, "bf16"))
    groups = [g.get("class") for g in root.iter("g")]
    assert groups == ["s0", "s1"]
    assert list(root.iter("circle"))
    assert list(root.iter("polygon"))
    labels = {e.text: float(e.get("y", "")) for e in root.iter("text") if "end" in e.get("class", "")}
    assert set(labels) == {"fp16", "bf16"}
    assert abs(labels["fp16"] - labels["bf16"]) >= 14


def test_labels_of_lines_that_end_far_apart_do_not_push_each_other() -> None:
    root = drawn(line([0.5] * 40, 0, "long"), line([0.5] * 3, 1, "short"))
    labels = [float(e.get("y", "")) for e in root.iter("text") if "end" in e.get("class", "")]
    assert labels[0] == labels[1]


def test_the_figure_is_named_and_described_for_screen_readers() -> None:
    root = drawn(line([0.25, 0.75]))
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "k-t k-d"
    ids = {e.get("id"): e.text for e in root if e.get("id")}
    assert ids["k-t"] == "T"
    assert ids["k-d"] == "fp16: 2 steps, first 0.25, last 0.75, lowest 0.25, highest 0.75."


def test_hostile_names_stay_text() -> None:
    evil = '</svg><script>alert("1")</script>'
    root = drawn(line([0.1, 0.2], tag=evil, marks=(Mark(step=1, value=0.1, text=evil),)), title=evil)
    assert not list(root.iter("script"))
    assert evil in "".join(root.itertext())


def test_the_moving_average_is_centred_and_shortened_at_the_ends() -> None:
    assert moving_average([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert moving_average([1.0, math.nan, 3.0], 3)[::2] == [1.0, 3.0]
    assert math.isnan(moving_average([1.0, math.nan, 3.0], 3)[1])


def test_smoothing_is_geometric_on_a_log_axis() -> None:
    values = [1e-8] * 20
    values[10] = 1e-5
    means = smoothed(chart(line(values), scale="log10", smooth=True), line(values))
    # Three steps: two of 1e-8 and one of 1e-5 multiply to 1e-21.
    assert smoothing_window(20) == 3
    assert means[10] == pytest.approx(1e-7)


def test_short_runs_are_not_smoothed() -> None:
    assert smoothing_window(14) == 1
    assert not paths(drawn(line([0.1, 0.9] * 5), smooth=True), "raw")
    assert paths(drawn(line([0.1, 0.9] * 20), smooth=True), "raw")


def test_thinning_keeps_every_extreme() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    points[5003] = (5003.0, 99.0)
    points[777] = (777.0, -99.0)
    kept = thin(points, 400)
    assert len(kept) <= 400
    assert (5003.0, 99.0) in kept
    assert (777.0, -99.0) in kept
    assert kept == sorted(kept)


def test_spread_keeps_order_gap_and_bounds() -> None:
    assert spread([50.0, 50.0, 90.0], 14, 0, 100) == [50.0, 64.0, 90.0]
    assert spread([99.0, 100.0], 14, 0, 100) == [86.0, 100.0]
