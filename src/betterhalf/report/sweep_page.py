"""The results of a sweep on the page: the table by combination, reward curves, and figures along each axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.comparison import changes_text
from betterhalf.report.data import Sweep
from betterhalf.report.drawing import STYLES
from betterhalf.report.emulated import emulated_sentence
from betterhalf.report.fields import Point, mapping, mappings, number, texts
from betterhalf.report.markup import Figure, figures, legend, note, notice, section, table
from betterhalf.report.numbers import Scale, smoothing_window
from betterhalf.report.sweep_table import (
    MEASURES,
    Row,
    axis_names,
    axis_text,
    cell_rows,
    combination_rows,
    emulated_names,
    explanation,
    head_of,
    outcome_text,
    table_text,
)
from betterhalf.words import counted

REWARD = "rollout/reward/mean"

MAX_PANELS = 36
"""Maximum number of reward panels; the table has every combination."""

_LONG = 500
"""Steps beyond which a reward curve is drawn as a moving average over its own faint line."""

_MAX_SERIES = 2 * STYLES
"""Maximum number of lines in a figure along an axis."""

_STAR = " A star marks an emulated format."

_ALONG_AXES: tuple[tuple[str, Scale, tuple[float, ...]], ...] = (
    ("reward_final", "linear", (0.0, 1.0)),
    ("accuracy", "linear", (0.0, 1.0)),
    ("k3_first", "log10", ()),
)
"""Measures drawn along each axis: key, scale, and values that the axis must reach."""


def sweep_section(sweep: Sweep, several: bool) -> str:
    """Return the sections of one sweep; `several` puts its name into their headings."""
    suffix = f": {sweep.name}" if several else ""
    emulated = emulated_sentence(emulated_names(sweep.rows))
    head, body = table_text(sweep.rows, brief=False)
    caption = note(explanation(sweep.rows, brief=False))
    result = (
        note(_settings(sweep.rows))
        + (notice(emulated) if emulated else "")
        + (table(head, body) + caption if body else notice("No run has finished yet."))
        + _labels(sweep.rows)
        + _exceptions(sweep.rows)
    )
    return (
        section(f"Results by combination{suffix}", result)
        + section(f"Reward of each run{suffix}", _panels(sweep))
        + section(f"Along each axis{suffix}", figures(_along_axes(sweep)))
        + section(f"Every run{suffix}", _every_run(sweep.rows))
    )


def _settings(rows: Sequence[Row]) -> str:
    """Return the settings that all runs share, in a line."""
    head = head_of(rows)
    settings = [f"{key} {value}" for key, value in mapping(head, "settings").items() if value is not None]
    done = f"{len(cell_rows(rows))} of {head.get('cells', '?')} runs"
    return " \u00b7 ".join([done, *settings])


def _labels(rows: Sequence[Row]) -> str:
    """Return the settings of each label of the axes that have names of their own, folded."""
    listed = [
        [str(axis.get("name")), label, changes_text(mapping(mapping(axis, "changes"), label))]
        for axis in mappings(head_of(rows), "axes")
        for label in mapping(axis, "changes")
    ]
    shown = table(["axis", "label", "settings"], listed, numeric=False)
    return f"<details><summary>Settings of the labels</summary>{shown}</details>" if listed else ""


def _exceptions(rows: Sequence[Row]) -> str:
    """Return the runs that ended early or failed, with their reasons."""
    listed = [[str(row.get("label")), str(row.get("outcome")), str(row["reason"])] for row in rows if "reason" in row]
    return table(["run", "outcome", "reason"], listed, numeric=False) if listed else ""


def _panels(sweep: Sweep) -> str:
    """Return one small chart of the reward for each combination, all on the same axes."""
    combinations = combination_rows(sweep.rows)
    drawn = [
        figure
        for index, row in enumerate(combinations[:MAX_PANELS])
        if (figure := _panel(sweep, row, f"sweep-{sweep.index}-reward-{index}"))
    ]
    left_out = len(combinations) - MAX_PANELS
    more = f"{left_out} more combinations are in the table only." if left_out > 0 else ""
    return figures(drawn) + note(more)


def _panel(sweep: Sweep, combination: Row, key: str) -> Figure | None:
    curves = [row for row in sweep.curves if row.get("combination") == combination.get("combination")]
    lines = tuple(_line(curve, style) for style, curve in enumerate(curves))
    title = ", ".join(f"{name} {axis_text(combination, name)}" for name in axis_names(sweep.rows)) or "all runs"
    smooth = any(len(line.points) > _LONG for line in lines)
    image = draw(Chart(key=key, title=f"Reward, {title}", series=lines, include=(0.0, 1.0), smooth=smooth))
    if image is None:
        return None
    return Figure(
        key=key,
        title=title,
        unit=f"{outcome_text(combination)}; mean reward of each step",
        image=image,
        caption=f"{counted(len(curves), 'run')}, one line for each seed.{_averaged(lines) if smooth else ''}",
        numbers=table(["seed", "first", "last", "lowest", "highest"], [_ends(curve) for curve in curves]),
    )


def _averaged(lines: Sequence[Series]) -> str:
    window = smoothing_window(max(len(line.points) for line in lines))
    return f" Bold: mean over {window} steps; faint: each step."


def _line(curve: Row, style: int) -> Series:
    seed = str(curve.get("seed", ""))
    return Series(tag=seed, name=f"seed {seed}", style=style, points=list(enumerate(_rewards(curve), 1)))


def _rewards(curve: Row) -> list[float]:
    values = curve.get(REWARD)
    return [number(value) for value in values] if isinstance(values, list) else []


def _ends(curve: Row) -> list[str]:
    values = [value for value in _rewards(curve) if math.isfinite(value)]
    shown = (values[0], values[-1], min(values), max(values)) if values else ()
    return [str(curve.get("seed", "")), *(f"{value:.3f}" for value in shown)]


def _along_axes(sweep: Sweep) -> list[Figure]:
    """Return the figures of each axis with several values: points for runs, lines through the means over seeds."""
    drawn = []
    for place, axis in enumerate(mappings(head_of(sweep.rows), "axes")):
        for measure, scale, include in _ALONG_AXES if len(texts(axis, "labels")) > 1 else ():
            key = f"sweep-{sweep.index}-axis-{place}-{measure}"
            if figure := _along(sweep.rows, axis, measure, scale, include, key):
                drawn.append(figure)
    return drawn


def _along(
    rows: Sequence[Row], axis: Row, measure: str, scale: Scale, include: tuple[float, ...], key: str
) -> Figure | None:
    name, places = str(axis.get("name")), _places(axis)
    groups = _groups(rows, name)
    shown = list(groups.items())[:_MAX_SERIES]
    series = [
        part
        for style, (group, (cells, means)) in enumerate(shown)
        for part in (
            Series(name=f"{group}, runs", style=style, points=_points(cells, name, places, measure), joined=False),
            Series(name=group, style=style, points=_points(means, name, places, measure)),
        )
    ]
    heading = next(known.heading for known in MEASURES if known.key == measure)
    plot = Chart(
        key=key,
        title=f"{heading} along {name}",
        series=tuple(series),
        across=str(axis.get("quantity", name)),
        scale=scale,
        include=include,
        across_ticks=_ticks(rows, axis, places),
    )
    starred = any(text.endswith("*") for _, text in plot.across_ticks or ())
    image = draw(plot)
    if image is None:
        return None
    left_out = (
        f" {len(groups) - len(shown)} more combinations are in the table only." if len(groups) > len(shown) else ""
    )
    return Figure(
        key=key,
        title=f"{heading} along {name}",
        unit="mean over seeds (line) and single runs (points)",
        image=image,
        caption=f"One line for each combination of the other axes.{left_out}{_STAR if starred else ''}",
        numbers=_numbers(shown, name, measure),
        legend=legend((style, escape(group)) for style, (group, _) in enumerate(shown)) if len(shown) > 1 else "",
    )


def _places(axis: Row) -> dict[str, float]:
    """Return the horizontal position of each value: its number, the mantissa bits of a format, or its order."""
    labels, positions = texts(axis, "labels"), axis.get("positions")
    known = positions if isinstance(positions, list) and len(positions) == len(labels) else range(len(labels))
    return {label: number(place) for label, place in zip(labels, known, strict=True)}


def _ticks(rows: Sequence[Row], axis: Row, places: Mapping[str, float]) -> tuple[tuple[float, str], ...]:
    emulated = emulated_names(rows)
    ticks = [(place, f"{label}*" if label in emulated else label) for label, place in places.items()]
    return tuple(sorted(ticks))


def _groups(rows: Sequence[Row], axis: str) -> dict[str, tuple[list[Row], list[Row]]]:
    """Return the runs and the means by the values of the other axes."""
    groups: dict[str, tuple[list[Row], list[Row]]] = {}
    for kind, found in enumerate((cell_rows(rows), combination_rows(rows))):
        for row in found:
            others = [f"{name} {axis_text(row, name)}" for name in axis_names(rows) if name != axis]
            groups.setdefault(", ".join(others) or "all runs", ([], []))[kind].append(row)
    return groups


def _points(rows: Sequence[Row], axis: str, places: Mapping[str, float], measure: str) -> list[Point]:
    found = [(places.get(str(mapping(row, "point").get(axis)), math.nan), _value(row, measure)) for row in rows]
    return sorted((x, y) for x, y in found if math.isfinite(x) and math.isfinite(y))


def _value(row: Row, measure: str) -> float:
    """Return the number of a run, or the mean of a combination."""
    value = row.get(measure)
    return number(value.get("mean") if isinstance(value, Mapping) else value)


def _numbers(groups: Sequence[tuple[str, tuple[list[Row], list[Row]]]], axis: str, measure: str) -> str:
    rows = [
        [group, axis_text(row, axis), f"{_value(row, measure):.4g}"] for group, (_, means) in groups for row in means
    ]
    return table(["", axis, "mean"], rows)


def _every_run(rows: Sequence[Row]) -> str:
    """Return the table of single runs, folded."""
    cells = cell_rows(rows)
    shown = [measure for measure in MEASURES if any(measure.key in row for row in cells)]
    body = [
        [
            str(row.get("label")),
            str(row.get("outcome")),
            *(format(number(row.get(measure.key)), measure.spec) if measure.key in row else "-" for measure in shown),
        ]
        for row in cells
    ]
    head = ["run", "outcome", *(measure.heading for measure in shown)]
    return f"<details><summary>{len(cells)} runs</summary>{table(head, body)}</details>" if cells else ""
